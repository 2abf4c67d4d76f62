local kind, id, record, sequence = unpack(ARGV)
if not redis.call('SET', 'flowpp:' .. kind .. ':' .. id, record, 'NX') then return 0 end
local known = cjson.decode(record)
index(kind, id, known, sequence)
at_least_sequence(sequence)
if type(known.job) == 'string' then redis.call('SADD', key(known.job) .. ':checkpoints', id) end
return 1
