local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
if get(id, 'type') == 'training' and (status == 'queued' or status == 'running') then return status end
if status ~= 'paused' then return 'refused ' .. status end
return become(id, 'queued')
