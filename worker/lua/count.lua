-- How many jobs there are of each type and status: of one owner or, where none is named, of all. Nil: not all are listed.
if not all_listed() then return nil end
local owners = #ARGV > 0 and ARGV or redis.call('SMEMBERS', 'flowpp:owners')
local found = {}
for _, type in ipairs(TYPES) do
  for _, status in ipairs(STATUSES) do
    local number = 0
    for _, owner in ipairs(owners) do number = number + redis.call('ZCARD', list_of({owner, type, status})) end
    table.insert(found, {type, status, number})
  end
end
return found
