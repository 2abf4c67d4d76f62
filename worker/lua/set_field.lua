local id, attempt, field, value = unpack(ARGV)
local status = current(id, attempt)
if status then set(id, field, value) end
return status
