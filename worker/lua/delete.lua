local id = ARGV[1]
local status = get(id, 'status')
if status == '' then
  redis.call('ZREM', 'flowpp:expiring', id)
  return 'missing'
end
local checkpoints = redis.call('SMEMBERS', key(id) .. ':checkpoints')
for _, checkpoint in ipairs(checkpoints) do
  if redis.call('SCARD', 'flowpp:uses:' .. checkpoint) > 0 then return 'refused in_use' end
end
if HELD[status] then
  redis.call('SADD', 'flowpp:deleting', id)
  set(id, 'deleting', '1')
  return status == 'cancelling' and status or wish(id, 'cancelling')
end
if not TERMINAL[status] then become(id, 'cancelled') end
for _, checkpoint in ipairs(checkpoints) do remove('checkpoint', checkpoint) end
redis.call('SREM', 'flowpp:deleting', id)
redis.call('ZREM', 'flowpp:expiring', id)
redis.call('ZREM', 'flowpp:jobs', id)
redis.call('ZREM', 'flowpp:jobs:owner:' .. get(id, 'owner'), id)
delist(id)
if redis.call('EXISTS', 'flowpp:jobs:owner:' .. get(id, 'owner')) == 0 then
  redis.call('SREM', 'flowpp:owners', get(id, 'owner'))
end
changed(id) -- the recorder deletes what is stored of a job that is not there
unwritten[id] = nil
redis.call('DEL', key(id), key(id) .. ':events', key(id) .. ':checkpoints')
return 'deleted'
