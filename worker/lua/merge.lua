-- Up to so many members of sorted sets that have none in common, behind a score, in order, each with its score.
-- Nil where these are lists by status and not all jobs are listed.
local order, behind, most, by_status = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1'
if by_status and not all_listed() then return nil end
local asc = order == 'asc'
local range = asc and 'ZRANGEBYSCORE' or 'ZREVRANGEBYSCORE'
local last = asc and '+inf' or '-inf' -- of those that can still be among them
local found = {}

local function is_before(one, other)
  local a, b = tonumber(one[2]), tonumber(other[2])
  if asc then return a < b end
  return a > b
end

local function keep_first()
  table.sort(found, is_before)
  for place = #found, most + 1, -1 do found[place] = nil end
  if #found == most then last = found[most][2] end
end

for _, index in ipairs(KEYS) do
  local more = redis.call(range, index, behind, last, 'WITHSCORES', 'LIMIT', 0, most)
  for place = 1, #more, 2 do table.insert(found, {more[place], more[place + 1]}) end
  if #found > 4 * most then keep_first() end
end
if #KEYS > 1 then keep_first() end
return found
