local id, attempt, kind, data = unpack(ARGV)
if not current(id, attempt) then return nil end
if kind == 'checkpoint' then changed(id) end
return emit(id, kind, data)
