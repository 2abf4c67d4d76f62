-- Lists by status of a server whose jobs are older than these lists; all of them, once.
if redis.call('EXISTS', 'flowpp:indexed') == 1 then return 0 end
for _, owner in ipairs(redis.call('SMEMBERS', 'flowpp:owners')) do
  for _, type in ipairs(TYPES) do
    for _, status in ipairs(STATUSES) do redis.call('DEL', list_of({owner, type, status})) end
  end
end
for _, type in ipairs(TYPES) do redis.call('DEL', 'flowpp:jobs:type:' .. type) end -- of older versions
redis.call('DEL', 'flowpp:counts')
local jobs = redis.call('ZRANGE', 'flowpp:jobs', 0, -1)
for _, id in ipairs(jobs) do
  local known = redis.call('HMGET', key(id), 'owner', 'type', 'status', 'sequence')
  if known[3] then
    redis.call('ZADD', list_of(known), known[4], id)
    redis.call('SADD', 'flowpp:owners', known[1] or '')
  end
end
redis.call('SET', 'flowpp:indexed', '1')
return #jobs
