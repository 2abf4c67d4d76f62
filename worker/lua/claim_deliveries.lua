local room, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
local t, claimed = now(), {}
for _, webhook in ipairs(redis.call('ZRANGEBYSCORE', 'flowpp:deliveries', '-inf', seconds(t), 'LIMIT', 0, 256)) do
  if #claimed >= room then break end
  local record = redis.call('GET', 'flowpp:webhook:' .. webhook)
  redis.call('ZREMRANGEBYSCORE', place(webhook, 'taken'), '-inf', seconds(t))
  local open = math.min(room - #claimed, MAX_AT_ONCE - redis.call('ZCARD', place(webhook, 'taken')))
  if open > 0 then
    local due = redis.call('ZRANGEBYSCORE', place(webhook, 'pending'), '-inf', seconds(t), 'LIMIT', 0, open)
    for _, delivery in ipairs(due) do
      local key, ends = 'flowpp:delivery:' .. delivery, seconds(t + lease)
      redis.call('ZADD', place(webhook, 'pending'), ends, delivery)
      redis.call('ZADD', place(webhook, 'taken'), ends, delivery)
      redis.call('HSET', key, 'last_attempt_at', seconds(t))
      local attempt = redis.call('HINCRBY', key, 'attempts', 1)
      local known = redis.call('HMGET', key, 'type', 'created_at', 'data')
      table.insert(claimed, {delivery, attempt, known[1], known[2], known[3], record})
    end
  end
  schedule(webhook)
end
return claimed
