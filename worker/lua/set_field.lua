local id, attempt, field, value = unpack(ARGV)
local status = current(id, attempt)
if status then set(id, field, value) end
if status and field == 'artifacts' then changed(id) end
return status
