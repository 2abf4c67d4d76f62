local kind, id, record, job, attempt, claim, most = unpack(ARGV)
local list = 'flowpp:' .. kind .. 's:owner:' .. owner_of(cjson.decode(record))
if tonumber(most or 0) > 0 and redis.call('ZCARD', list) >= tonumber(most) then return 0 end
if job ~= '' then
  if not current(job, attempt) then return 0 end
  redis.call('SADD', key(job) .. ':checkpoints', id)
end
redis.call('SET', 'flowpp:' .. kind .. ':' .. id, record)
index(kind, id, cjson.decode(record), redis.call('INCR', 'flowpp:sequence'))
created(claim, id)
return 1
