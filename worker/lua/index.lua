-- The next slice of putting all jobs into the lists by status: of so many of them. Whether more is to be done.
-- Where jobs change between two slices, they are listed as they then are.
if all_listed() then return 0 end
local most, behind = tonumber(ARGV[1]), redis.call('GET', 'flowpp:indexed')
if not behind then -- first goes what is listed: a version that moves no jobs may have changed them
  redis.call('SUNIONSTORE', 'flowpp:unlisting', 'flowpp:unlisting', 'flowpp:owners')
  redis.call('DEL', 'flowpp:owners')
  for _, type in ipairs(TYPES) do redis.call('UNLINK', 'flowpp:jobs:type:' .. type) end -- of older versions
  redis.call('DEL', 'flowpp:counts')
  redis.call('SET', 'flowpp:indexed', '(-inf')
  return 1
end
local owners = redis.call('SPOP', 'flowpp:unlisting', most)
for _, owner in ipairs(owners) do
  for _, type in ipairs(TYPES) do
    for _, status in ipairs(STATUSES) do redis.call('UNLINK', list_of({owner, type, status})) end
  end
end
if #owners > 0 then return 1 end
local jobs = redis.call('ZRANGEBYSCORE', 'flowpp:jobs', behind, '+inf', 'WITHSCORES', 'LIMIT', 0, most)
for place = 1, #jobs, 2 do
  local known = redis.call('HMGET', key(jobs[place]), 'owner', 'type', 'status', 'sequence')
  if known[3] then
    redis.call('ZADD', list_of(known), known[4], jobs[place])
    redis.call('SADD', 'flowpp:owners', known[1] or '')
  end
end
local more = #jobs == 2 * most
redis.call('SET', 'flowpp:indexed', more and '(' .. jobs[#jobs] or '1')
return more and 1 or 0
