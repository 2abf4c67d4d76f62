-- Notes an existing record for an idempotency key, as if the request had created it. Returns 0 if there is no record.
local kind, id, claim = unpack(ARGV)
if redis.call('EXISTS', 'flowpp:' .. kind .. ':' .. id) == 0 then return 0 end
created(claim, id)
return 1
