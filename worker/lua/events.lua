-- Events of a stream from one on, of some types: what matches among the next so many, and where the next ones begin.
local order, start, most, types = ARGV[1], ARGV[2], tonumber(ARGV[3]), {}
for place = 5, #ARGV do types[ARGV[place]] = true end
local chunk = tonumber(ARGV[4])
local entries
if order == 'desc' then
  entries = redis.call('XREVRANGE', KEYS[1], start, '-', 'COUNT', chunk)
else
  entries = redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', chunk)
end
local found = {}
for _, entry in ipairs(entries) do
  if types[entry[2][2]] then -- the field `type` is the first
    table.insert(found, entry)
    if #found == most then break end
  end
end
local more = #entries == chunk and #found < most
return {found, more and entries[#entries][1] or ''}
