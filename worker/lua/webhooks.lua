-- Behind the prelude of each script: a job's event becomes a delivery for each webhook of its owner that wants it.
-- MAX_WAITING, MAX_ENDED, MAX_AT_ONCE, MAX_RESULT and MAX_FAILING are set by worker/transitions.py.

local function place(webhook, what) return 'flowpp:webhook:' .. webhook .. ':' .. what end

-- When a webhook is looked at again. Those that were served go behind the others that are due, and one with as many
-- under way as may be waits for the first of them.
local function schedule(webhook)
  local t = now()
  local first = redis.call('ZRANGE', place(webhook, 'pending'), 0, 0, 'WITHSCORES')
  if #first == 0 then
    redis.call('ZREM', 'flowpp:deliveries', webhook)
    return
  end
  local due = math.max(t, tonumber(first[2]))
  redis.call('ZREMRANGEBYSCORE', place(webhook, 'taken'), '-inf', seconds(t))
  if redis.call('ZCARD', place(webhook, 'taken')) >= MAX_AT_ONCE then
    local taken = redis.call('ZRANGE', place(webhook, 'taken'), 0, 0, 'WITHSCORES')
    due = math.max(due, tonumber(taken[2]))
  end
  redis.call('ZADD', 'flowpp:deliveries', seconds(due), webhook)
end

-- Whether it was queued: not where too many wait.
local function deliver(webhook, delivery, event, data)
  if redis.call('ZCARD', place(webhook, 'pending')) >= MAX_WAITING then return false end
  local t = seconds(now())
  redis.call('HSET', 'flowpp:delivery:' .. delivery, 'webhook', webhook, 'type', event, 'data', data,
    'created_at', t, 'status', 'pending', 'attempts', 0)
  redis.call('ZADD', place(webhook, 'pending'), t, delivery)
  redis.call('ZADD', 'flowpp:deliveries', 'LT', t, webhook)
  return true
end

-- Of the deliveries that are over only the last are remembered, and of none the content.
local function close(webhook, delivery, status)
  redis.call('HSET', 'flowpp:delivery:' .. delivery, 'status', status)
  redis.call('HDEL', 'flowpp:delivery:' .. delivery, 'data')
  redis.call('ZREM', place(webhook, 'pending'), delivery)
  redis.call('ZREM', place(webhook, 'taken'), delivery)
  redis.call('LPUSH', place(webhook, 'ended'), delivery)
  for _, old in ipairs(redis.call('LRANGE', place(webhook, 'ended'), MAX_ENDED, -1)) do
    redis.call('DEL', 'flowpp:delivery:' .. old)
  end
  redis.call('LTRIM', place(webhook, 'ended'), 0, MAX_ENDED - 1)
end

local function disable(webhook, reason)
  redis.call('HSET', place(webhook, 'state'), 'disabled_reason', reason)
  for _, delivery in ipairs(redis.call('ZRANGE', place(webhook, 'pending'), 0, -1)) do
    local key = 'flowpp:delivery:' .. delivery
    if redis.call('HGET', key, 'type') ~= 'ping' then
      redis.call('HSETNX', key, 'error', 'not sent: the webhook was disabled')
      close(webhook, delivery, 'dead')
    end
  end
end

local function wants(webhook, event)
  local record = redis.call('GET', 'flowpp:webhook:' .. webhook)
  if not record or redis.call('HEXISTS', place(webhook, 'state'), 'disabled_reason') == 1 then return false end
  for _, wanted in ipairs(cjson.decode(record).events) do
    if wanted == event then return true end
  end
  return false
end

-- What a receiver is told: JSON made of the JSON in the record, so that no number changes.
local function told(id, kind, data, event_id)
  local function json(field, most)
    local value = get(id, field)
    return (value == '' or #value > (most or #value)) and 'null' or value
  end
  local said = {
    '"id":' .. cjson.encode(id), '"object":"job"', '"type":' .. cjson.encode(get(id, 'type')),
    '"status":' .. cjson.encode(get(id, 'status')), '"attempt":' .. json('attempt'), '"metadata":' .. json('metadata'),
    '"error":' .. json('error'), '"result":' .. json('result', MAX_RESULT), '"event_id":' .. cjson.encode(event_id),
  }
  if kind == 'checkpoint' then table.insert(said, '"checkpoint":' .. data) end
  return '{' .. table.concat(said, ',') .. '}'
end

local webhooks_of = {}

function notify(id, kind, data, event_id)
  local owner = get(id, 'owner')
  if not webhooks_of[owner] then
    local list = 'flowpp:webhooks:owner:' .. (owner == '' and 'local' or owner)
    webhooks_of[owner] = redis.call('ZRANGE', list, 0, -1)
  end
  local event = 'job.' .. (kind == 'checkpoint' and kind or get(id, 'status'))
  for _, webhook in ipairs(webhooks_of[owner]) do
    if wants(webhook, event) then
      local delivery = 'dlv_' .. string.sub(redis.sha1hex(webhook .. id .. event_id), 1, 24)
      if not deliver(webhook, delivery, event, told(id, kind, data, event_id)) then
        redis.call('HINCRBY', place(webhook, 'state'), 'dropped', 1)
      end
    end
  end
end
