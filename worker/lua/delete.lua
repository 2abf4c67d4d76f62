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
  sadd('flowpp:deleting', id)
  set(id, 'deleting', '1')
  return status == 'cancelling' and status or wish(id, 'cancelling')
end
if not TERMINAL[status] then become(id, 'cancelled') end
for _, checkpoint in ipairs(checkpoints) do remove('checkpoint', checkpoint) end
srem('flowpp:deleting', id)
zrem('flowpp:expiring', id)
zrem('flowpp:jobs', id)
delist(id)
redis.call('ZREM', 'flowpp:jobs:owner:' .. get(id, 'owner'), id)
if redis.call('EXISTS', 'flowpp:jobs:owner:' .. get(id, 'owner')) == 0 then srem('flowpp:owners', get(id, 'owner')) end
changed(id) -- the recorder deletes what is stored of a job that is not there
later('DEL', key(id), key(id) .. ':events', key(id) .. ':checkpoints')
return 'deleted'
