local kind, id, record, job, attempt, claim = unpack(ARGV)
if job ~= '' then
  if not current(job, attempt) then return 0 end
  redis.call('SADD', key(job) .. ':checkpoints', id)
end
redis.call('SET', 'flowpp:' .. kind .. ':' .. id, record)
index(kind, id, cjson.decode(record), redis.call('INCR', 'flowpp:sequence'))
created(claim, id)
return 1
