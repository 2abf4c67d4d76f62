local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
if status ~= 'paused' then return 'refused ' .. status end
return become(id, 'queued')
