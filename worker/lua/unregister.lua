local kind, id, job = unpack(ARGV)
if redis.call('SCARD', 'flowpp:uses:' .. id) > 0 then return 'in_use' end
if not remove(kind, id) then return 'missing' end
if job ~= '' then
  redis.call('SREM', key(job) .. ':checkpoints', id)
  if forget_checkpoint(job, id) then changed(job) end
end
return 'deleted'
