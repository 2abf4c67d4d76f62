-- Which of some jobs match, so that the others' records need not be sent and read.
local wanted, found = cjson.decode(ARGV[1]), {}
local with_metadata = next(wanted.metadata) ~= nil

local function has_metadata(id)
  local written = get(id, 'metadata')
  local metadata = written ~= '' and cjson.decode(written) or {}
  for name, value in pairs(wanted.metadata) do
    if metadata[name] ~= value then return false end
  end
  return true
end

for place = 2, #ARGV do
  local id = ARGV[place]
  local known = redis.call('HMGET', key(id), 'type', 'status', 'owner')
  if known[1] and (wanted.type == '' or known[1] == wanted.type)
    and (wanted.status == '' or known[2] == wanted.status) and (wanted.owner == '' or known[3] == wanted.owner)
    and (not with_metadata or has_metadata(id)) then
    table.insert(found, id)
  end
end
return found
