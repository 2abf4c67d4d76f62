local delivery, attempt, outcome, code, said, delay = unpack(ARGV)
local key = 'flowpp:delivery:' .. delivery
local known = redis.call('HMGET', key, 'webhook', 'attempts', 'status', 'type')
local webhook, t = known[1], now()
if known[2] ~= attempt or known[3] ~= 'pending' then return 0 end
redis.call('ZREM', place(webhook, 'taken'), delivery)
redis.call('HSET', key, 'status_code', code, 'error', said)
local state = place(webhook, 'state')
if outcome == 'delivered' then
  redis.call('HDEL', state, 'failing_since', 'disabled_reason')
  close(webhook, delivery, 'delivered')
else
  redis.call('HSETNX', state, 'failing_since', seconds(t))
  if tonumber(delay) >= 0 then
    redis.call('ZADD', place(webhook, 'pending'), seconds(t + tonumber(delay)), delivery)
  else
    close(webhook, delivery, 'dead')
    local failing = t - tonumber(redis.call('HGET', state, 'failing_since'))
    if outcome == 'gone' then
      disable(webhook, 'its endpoint answered 410 Gone')
    elseif known[4] ~= 'ping' and failing > MAX_FAILING then
      disable(webhook, string.format('nothing could be delivered for %d days', MAX_FAILING / 86400))
    end
  end
end
schedule(webhook)
return 1
