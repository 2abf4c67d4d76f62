local id, limit, most, claim = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local fields = cjson.decode(ARGV[5])
if redis.call('ZCARD', 'flowpp:queued:' .. fields.queue) >= limit then return 'full' end
if redis.call('SCARD', 'flowpp:unfinished:' .. fields.owner) >= most then return 'quota' end
for resource in string.gmatch(fields.uses, '%S+') do
  if redis.call('EXISTS', 'flowpp:' .. kind_of(resource) .. ':' .. resource) == 0 then return resource end
end
for resource in string.gmatch(fields.uses, '%S+') do redis.call('SADD', 'flowpp:uses:' .. resource, id) end
local cancel_after = tonumber(fields.cancel_after)
fields.cancel_after = nil
for name, value in pairs(fields) do set(id, name, value) end
local sequence = redis.call('INCR', 'flowpp:sequence')
set(id, 'created_at', seconds(now()), 'sequence', sequence, 'attempt', 0, 'failures', 0)
if cancel_after then
  local due = seconds(now() + cancel_after)
  set(id, 'cancel_at', due)
  redis.call('ZADD', 'flowpp:deadlines', due, id)
end
index_job(id)
become(id, 'queued')
created(claim, id)
local t = seconds(now())
local awake = redis.call('ZCOUNT', 'flowpp:awake:' .. fields.queue, t, '+inf')
local heard = awake > 0 and awake >= redis.call('ZCOUNT', 'flowpp:workers:' .. fields.queue, t, '+inf')
return {heard and 1 or 0, redis.call('HGETALL', key(id))}
