local queue, worker = ARGV[1], ARGV[2]
if redis.call('ZCARD', 'flowpp:queued:' .. queue) > 0 then return 0 end
redis.call('ZREM', 'flowpp:awake:' .. queue, worker)
return 1
