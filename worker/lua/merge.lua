-- Up to so many members of sorted sets that have none in common, behind a score, in order, each with its score.
local order, behind, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local asc = order == 'asc'
local range = asc and 'ZRANGEBYSCORE' or 'ZREVRANGEBYSCORE'
local last = asc and '+inf' or '-inf' -- of those that can still be among them
local found = {}
for _, index in ipairs(KEYS) do
  local more = redis.call(range, index, behind, last, 'WITHSCORES', 'LIMIT', 0, most)
  for place = 1, #more, 2 do table.insert(found, {more[place], more[place + 1]}) end
  if #more > 0 and #KEYS > 1 then
    table.sort(found, function(one, other)
      local a, b = tonumber(one[2]), tonumber(other[2])
      if asc then return a < b else return a > b end
    end)
    for place = #found, most + 1, -1 do found[place] = nil end
    if #found == most then last = found[most][2] end
  end
end
return found
