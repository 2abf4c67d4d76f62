local webhook = ARGV[1]
if not remove('webhook', webhook) then return 'missing' end
for _, delivery in ipairs(redis.call('ZRANGE', place(webhook, 'pending'), 0, -1)) do
  redis.call('DEL', 'flowpp:delivery:' .. delivery)
end
for _, delivery in ipairs(redis.call('LRANGE', place(webhook, 'ended'), 0, -1)) do
  redis.call('DEL', 'flowpp:delivery:' .. delivery)
end
for _, what in ipairs({'pending', 'taken', 'ended', 'state'}) do redis.call('DEL', place(webhook, what)) end
redis.call('ZREM', 'flowpp:deliveries', webhook)
return 'deleted'
