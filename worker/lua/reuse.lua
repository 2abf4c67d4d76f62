-- Notes an existing record for an idempotency key, as if the request had created it. Whether the record still exists.
local kind, id, claim = unpack(ARGV)
if redis.call('EXISTS', 'flowpp:' .. kind .. ':' .. id) == 0 then return 0 end
created(claim, id)
return 1
