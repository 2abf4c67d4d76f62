-- Counts the jobs of a server whose jobs are older than flowpp:counts, once.
if redis.call('EXISTS', 'flowpp:counts') == 1 then return 0 end
local jobs = redis.call('ZRANGE', 'flowpp:jobs', 0, -1)
for _, id in ipairs(jobs) do count(id, 1) end
return #jobs
