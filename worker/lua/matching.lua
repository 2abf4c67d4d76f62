-- Which of some jobs have these metadata, so that the others' records need not be sent and read.
local wanted, found = cjson.decode(ARGV[1]), {}

local function has_metadata(id)
  local written = get(id, 'metadata')
  local metadata = written ~= '' and cjson.decode(written) or {}
  for name, value in pairs(wanted) do
    if metadata[name] ~= value then return false end
  end
  return true
end

for place = 2, #ARGV do
  if has_metadata(ARGV[place]) then table.insert(found, ARGV[place]) end
end
return found
