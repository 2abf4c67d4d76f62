local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
if status == 'pausing' or status == 'paused' then return status end
if get(id, 'type') ~= 'training' or (status ~= 'queued' and status ~= 'running') then return 'refused ' .. status end
if status == 'queued' then return become(id, 'paused') end
return wish(id, 'pausing')
