local id, attempt, kind, data = unpack(ARGV)
if not current(id, attempt) then return nil end
if kind == 'checkpoint' then
  changed(id)
  set(id, 'checkpoint_at', seconds(now()))
elseif kind == 'metrics' then -- for who wants to know how it goes, and not all that it has told
  set(id, 'latest', data)
  if string.find(data, '"validation_bits_per_dim"', 1, true) then set(id, 'validated', data) end
end
return emit(id, kind, data)
