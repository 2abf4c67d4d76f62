local id = ARGV[1]
local status = get(id, 'status')
if status == '' then return 'missing' end
if TERMINAL[status] then return 'refused ' .. status end
if status == 'queued' or status == 'paused' then return become(id, 'cancelled') end
if status == 'cancelling' then return status end
return wish(id, 'cancelling')
