local id, attempt, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local status = current(id, attempt)
if status and lease > 0 then redis.call('ZADD', 'flowpp:leases', 'XX', seconds(now() + lease), id) end
return status
