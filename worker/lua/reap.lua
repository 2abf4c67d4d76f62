local lease, may_end = tonumber(ARGV[1]), ARGV[2] == '1'
-- A lease that ends later than any can was given before the clock was put back.
local latest = seconds(now() + lease)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'flowpp:leases', '(' .. latest, '+inf')) do
  redis.call('ZADD', 'flowpp:leases', latest, id)
end
if not may_end then return {} end
local ended = redis.call('ZRANGEBYSCORE', 'flowpp:leases', '-inf', seconds(now()), 'LIMIT', 0, 100)
for _, id in ipairs(ended) do
  settle(id, 'crashed', 'worker_lost', 'the worker that held the job was lost: its lease ran out')
end
return ended
