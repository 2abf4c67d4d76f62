-- A job as it was recorded, after its events. One that a worker held waits again, or is what was wished of it.
local id, fields, lost = ARGV[1], cjson.decode(ARGV[2]), ARGV[3]
for name, value in pairs(fields) do set(id, name, value) end
enlist(id)
at_least_sequence(fields.sequence)
set(id, 'recorded', fields.changed)
index_job(id)
if fields.deleting then sadd('flowpp:deleting', id) end
local turn, turns = tonumber(fields.turn), 'flowpp:turn:' .. fields.queue
local function at_least(owner, turn)
  turn = math.max(turn, tonumber(redis.call('HGET', turns, owner) or 0))
  redis.call('HSET', turns, owner, string.format('%.0f', turn))
end
if turn then
  if tonumber(fields.attempt) > 0 then at_least('', turn) end
  at_least(fields.owner, turn + math.max(1, tonumber(fields.size)))
end
if TERMINAL[fields.status] then
  if fields.expires_at then zadd('flowpp:expiring', fields.expires_at, id) end
  return fields.status
end
if fields.cancel_at then zadd('flowpp:deadlines', fields.cancel_at, id) end
for resource in string.gmatch(fields.uses, '%S+') do sadd('flowpp:uses:' .. resource, id) end
if fields.status == 'queued' then zadd('flowpp:queued:' .. fields.queue, turn or 0, id) end
if not HELD[fields.status] then return fields.status end
if fields.status == 'cancelling' then return become(id, 'cancelled', {message = 'cancelled'}) end
set(id, 'ended', lost)
return become(id, fields.status == 'pausing' and 'paused' or 'queued', {message = lost})
