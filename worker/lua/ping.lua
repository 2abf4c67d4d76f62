local webhook, delivery, data = unpack(ARGV)
if redis.call('EXISTS', 'flowpp:webhook:' .. webhook) == 0 then return 'missing' end
return deliver(webhook, delivery, 'ping', data) and 'queued' or 'full'
