-- Lists by status of a server whose jobs are older than these lists; all of them, once.
if redis.call('EXISTS', 'flowpp:indexed') == 1 then return 0 end
local types = {'training', 'likelihood', 'sampling'}
local statuses = {'queued', 'running', 'pausing', 'paused', 'cancelling', 'succeeded', 'failed', 'cancelled'}
for _, owner in ipairs(redis.call('SMEMBERS', 'flowpp:owners')) do
  for _, type in ipairs(types) do
    for _, status in ipairs(statuses) do
      redis.call('DEL', table.concat({'flowpp:jobs:status', owner, type, status}, ':'))
    end
  end
end
for _, type in ipairs(types) do redis.call('DEL', 'flowpp:jobs:type:' .. type) end -- of older versions
redis.call('DEL', 'flowpp:counts')
local jobs = redis.call('ZRANGE', 'flowpp:jobs', 0, -1)
for _, id in ipairs(jobs) do enlist(id) end
redis.call('SET', 'flowpp:indexed', '1')
return #jobs
