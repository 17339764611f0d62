-- Wireshark and tshark: CXTP (RFC 4067, with this project's blocks) and the UPDATE_SPI notifies of IKEv2.
--
-- To use it, copy the file to the folder "Personal Lua Plugins" that Help > About > Folders names, or
--     tshark -X lua_script:ikectx.lua -r capture.pcap
--
-- Wireshark 4.4 and later run no Lua scripts for root: tshark.sh beside this file helps there.
--
-- CXTP is on port 5091: UDP between mobile node and gateway; TCP between gateways, plain (under IPsec) or in
-- TLS. For TLS, Wireshark needs the session's secrets: run one agent with SSLKEYLOGFILE=/run/ikectx.keys and
--     tshark -o tls.keylog_file:/run/ikectx.keys ...
--
-- The notifies are inside SK. Wireshark decrypts IKEv2 with a table of keys (Preferences > Protocols >
-- ISAKMP > IKEv2 Decryption Table), or on the command line, all values in hex:
--     tshark -o 'uat:ikev2_decryption_table:<SPIi>,<SPIr>,<SK_ei>,<SK_er>,"<cipher [RFC]>",<SK_ai>,<SK_ar>,"<integrity [RFC]>"'
-- With AES-GCM, SK_e is the key with its 4 octets of salt behind it, and SK_a is empty. The names are those of
-- the table's menus, "AES-GCM-128 with 16 octet ICV [RFC5282]" and "NONE [RFC4306]" for one.
-- `ikectx show --secrets` prints the keys of a live SA; charon logs them at level 4 of its ike log.
--
-- A capture that is decrypted so shows keys: those of TLS show every context that was moved.

local PORT = 5091
local HEADER = 4
local MN_TOKEN, PROOF, NEW_SPIS, WHEREABOUTS, IKEV2_SA = 0xFF05, 0xFF06, 0xFF07, 0xFF0A, 0xFF01
local REASON, COOKIE = 0xFF0B, 0xFF0C

local TYPES = {
  [1] = "CTAR", [2] = "CTAA", [3] = "CTD", [4] = "PCTD", [5] = "CTDR", [6] = "CTC", [7] = "CT-Req",
}
local FPTS = {
  [0x0001] = "MLD", [0xFF01] = "IKEV2_SA", [0xFF02] = "SAD", [0xFF03] = "SPD", [0xFF04] = "PAD",
  [0xFF05] = "MN_TOKEN", [0xFF06] = "PROOF", [0xFF07] = "NEW_SPIS", [0xFF08] = "REQUEST", [0xFF09] = "GO_ON",
  [0xFF0A] = "WHEREABOUTS", [0xFF0B] = "REASON", [0xFF0C] = "COOKIE",
}
-- What is cut into several blocks, by the messages it comes in.
local JOINED = { [0xFF01] = "34", [0xFF02] = "34", [0xFF03] = "34", [0xFF04] = "34", [0xFF06] = "7" }
local STATUSES = {
  [0x00] = "OK", [0x01] = "BAD_CHECKSUM", [0x80] = "FAILED", [0x81] = "MALFORMED", [0x82] = "NOT_ALLOWED",
  [0x83] = "NO_CONNECTION", [0x84] = "NO_CHILD", [0x85] = "IKE_SPI_IN_USE", [0x86] = "ESP_SPI_IN_USE",
  [0x87] = "VIP_IN_USE", [0x88] = "SELECTORS_OVERLAP", [0x89] = "ALGORITHM", [0x8A] = "PROPOSAL",
  [0x8B] = "NO_ADDRESS", [0x8C] = "CHARON", [0x8D] = "KERNEL", [0x8E] = "UNREACHABLE", [0x8F] = "PEER_SILENT",
  [0x90] = "PEER_REFUSED", [0x91] = "UNKNOWN_SA", [0x92] = "UNKNOWN_TRANSFER", [0x93] = "BUSY",
  [0x94] = "STALE_EPOCH", [0x95] = "NOT_COVERED", [0x96] = "AMBIGUOUS", [0x97] = "IN_DOUBT",
  [0x98] = "NO_MOBIKE", [0x9A] = "IDENTITY", [0x9B] = "AUTHENTICATION",
  [0x9C] = "MN_ADDRESS", [0x9D] = "VIP_NOT_ALLOWED", [0x9E] = "SELECTORS", [0x9F] = "MODE",
  [0xA0] = "LIFETIME", [0xA1] = "NUMBERS_SPENT", [0xA2] = "SPIS", [0xA3] = "TOO_MUCH", [0xA4] = "PPK",
  [0xA5] = "NOT_ESP", [0xA6] = "LOCAL_VIP", [0xA7] = "KEY_EXCHANGES", [0xA8] = "PER_CPU",
  [0xA9] = "OFFLOADED",
}
local ALGORITHMS = { [0] = "none", [1] = "HMAC_SHA1", [0xFF01] = "MN_TOKEN (HMAC-SHA-256)" }
local PLACES = { [1] = "here", [2] = "moved", [3] = "ended", [4] = "end it", [5] = "renamed", [6] = "came",
  [7] = "ready" }
local PURPOSES = { [1] = "announce", [2] = "arrive" }
local PROTOCOLS = { [0] = "none", [1] = "IKE", [2] = "AH", [3] = "ESP" }
local SPI_SIZES = { [1] = 8, [2] = 4, [3] = 4 }
local NOTIFIES = { [41960] = "UPDATE_SPI_SUPPORTED", [41961] = "UPDATE_SPI", [41962] = "UPDATE_SPI_REFUSED" }
local REASONS = { [1] = "unknown SA", [2] = "new SPI unusable", [3] = "not allowed", [4] = "busy with a rekey" }

-- CXTP ------------------------------------------------------------------------------------------------

local cxtp = Proto("cxtp", "Context Transfer Protocol")

local f = {
  version = ProtoField.uint8("cxtp.version", "Version", base.DEC, nil, 0xF0),
  type = ProtoField.uint8("cxtp.type", "Type", base.DEC, TYPES, 0x0F),
  v = ProtoField.bool("cxtp.flags.v", "V: IPv4 addresses", 8, nil, 0x80),
  a = ProtoField.bool("cxtp.flags.a", "A: acknowledgement wanted", 8, nil, 0x40),
  s = ProtoField.bool("cxtp.flags.s", "S: all contexts received", 8, nil, 0x40),
  reserved = ProtoField.uint8("cxtp.flags.reserved", "Reserved", base.HEX, nil, 0x3F),
  length = ProtoField.uint16("cxtp.length", "Length"),
  mn = ProtoField.ipv4("cxtp.mn", "MN's previous address"),
  mn6 = ProtoField.ipv6("cxtp.mn6", "MN's previous address"),
  router = ProtoField.ipv4("cxtp.router", "Other router"),
  router6 = ProtoField.ipv6("cxtp.router6", "Other router"),
  sequence = ProtoField.uint32("cxtp.sequence", "Sequence number"),
  token = ProtoField.uint32("cxtp.token", "Token", base.HEX),
  elapsed = ProtoField.uint32("cxtp.elapsed", "Elapsed time (ms)"),
  algorithm = ProtoField.uint16("cxtp.algorithm", "Token algorithm", base.HEX, ALGORITHMS),
  key_length = ProtoField.uint16("cxtp.key_length", "Key length"),
  key = ProtoField.bytes("cxtp.key", "Key"),
  block = ProtoField.none("cxtp.block", "Context Data Block"),
  fpt = ProtoField.uint16("cxtp.block.fpt", "Feature profile type", base.HEX, FPTS),
  units = ProtoField.uint8("cxtp.block.length", "Length (8 octets each)"),
  p = ProtoField.bool("cxtp.block.p", "P: presence vector", 8, nil, 0x80),
  presence = ProtoField.uint32("cxtp.block.presence", "Presence vector", base.HEX),
  data = ProtoField.bytes("cxtp.block.data", "Data"),
  spi_i = ProtoField.bytes("cxtp.spi_i", "Initiator SPI"),
  spi_r = ProtoField.bytes("cxtp.spi_r", "Responder SPI"),
  status = ProtoField.none("cxtp.status_block", "Status"),
  status_fpt = ProtoField.uint16("cxtp.status.fpt", "Feature profile type", base.HEX, FPTS),
  status_code = ProtoField.uint8("cxtp.status", "Status", base.HEX, STATUSES),
  purpose = ProtoField.uint8("cxtp.mn_token.purpose", "Purpose", base.DEC, PURPOSES),
  care_family = ProtoField.uint8("cxtp.mn_token.family", "Care-of family"),
  care_port = ProtoField.uint16("cxtp.mn_token.port", "Care-of port"),
  expiry = ProtoField.absolute_time("cxtp.mn_token.expiry", "Expires", base.UTC),
  next_gateway = ProtoField.uint32("cxtp.mn_token.next_gateway", "Gateway's next request ID"),
  next_mn = ProtoField.uint32("cxtp.mn_token.next_mn", "Mobile node's next request ID"),
  psg = ProtoField.string("cxtp.mn_token.psg", "Previous gateway"),
  nsg = ProtoField.string("cxtp.mn_token.nsg", "New gateway"),
  care_of = ProtoField.ipv4("cxtp.mn_token.care_of", "Care-of address"),
  care_of6 = ProtoField.ipv6("cxtp.mn_token.care_of6", "Care-of address"),
  tag = ProtoField.bytes("cxtp.mn_token.tag", "Tag"),
  profile = ProtoField.string("cxtp.profile", "Profile"),
  new_protocol = ProtoField.uint8("cxtp.new_spis.protocol", "Renamed SA, protocol", base.DEC, PROTOCOLS),
  new_old = ProtoField.bytes("cxtp.new_spis.old", "Old SPI"),
  new_new = ProtoField.bytes("cxtp.new_spis.new", "New SPI"),
  place = ProtoField.uint8("cxtp.whereabouts.what", "SA that was handed on", base.DEC, PLACES),
  epoch = ProtoField.uint64("cxtp.whereabouts.epoch", "Epoch"),
  moved_to = ProtoField.string("cxtp.whereabouts.to", "Gateway it moved to"),
  proof = ProtoField.uint16("cxtp.proof", "IKE message of the MN, octets"),
}
for _, field in pairs(f) do
  table.insert(cxtp.fields, field)
end

local e = {
  malformed = ProtoExpert.new("cxtp.malformed", "Malformed", expert.group.MALFORMED, expert.severity.ERROR),
  failed = ProtoExpert.new("cxtp.failed", "A context failed", expert.group.RESPONSE_CODE, expert.severity.NOTE),
  unknown = ProtoExpert.new("cxtp.unknown", "Unknown", expert.group.UNDECODED, expert.severity.NOTE),
}
cxtp.experts = { e.malformed, e.failed, e.unknown }

-- What is read: a part of the buffer, from `at` to `stop`. Running out of it ends the message.
local SHORT = {}

local function take(r, count, what)
  if r.at + count > r.stop then
    SHORT.what = what
    error(SHORT, 0)
  end
  local range = r.tvb(r.at, count)
  r.at = r.at + count
  return range
end

local function add(r, tree, field, count, what)
  local range = take(r, count, what or "a field")
  return range, tree:add(field, range)
end

local function add_address(r, tree, v4, field4, field6, what)
  local range = take(r, v4 and 4 or 16, what)
  tree:add(v4 and field4 or field6, range)
  return v4 and tostring(range:ipv4()) or tostring(range:ipv6())
end

local function name_of(names, number, format)
  return names[number] or string.format(format or "%d", number)
end

local function zero(r)
  while r.at < r.stop do
    if r.tvb(r.at, 1):uint() ~= 0 then return false end
    r.at = r.at + 1
  end
  return true
end

-- A message ID; all ones: not said.
local function add_next(r, tree, field)
  local value, item = add(r, tree, field, 4, "next request ID")
  if value:uint() == 0xFFFFFFFF then item:append_text(" (not said)") end
end

local function dissect_token(r, tree, kind)
  add(r, tree, f.purpose, 1, "purpose")
  if kind == 2 then -- in a CTAA
    take(r, 3, "reserved octets")
    add_next(r, tree, f.next_mn)
    add(r, tree, f.tag, 16, "tag")
    return
  end
  local family = add(r, tree, f.care_family, 1, "care-of family"):uint()
  add(r, tree, f.care_port, 2, "care-of port")
  add(r, tree, f.expiry, 4, "expiry")
  add_next(r, tree, f.next_gateway)
  add(r, tree, f.spi_i, 8, "SPI")
  add(r, tree, f.spi_r, 8, "SPI")
  for _, field in ipairs({ f.psg, f.nsg }) do
    local size = take(r, 1, "length of a gateway's name"):uint()
    tree:add_packet_field(field, take(r, size, "a gateway's name"), ENC_UTF_8)
  end
  if family == 4 or family == 6 then
    add_address(r, tree, family == 4, f.care_of, f.care_of6, "care-of address")
  elseif family ~= 0 then
    tree:add_proto_expert_info(e.malformed, "a care-of address of family " .. family)
  end
  add(r, tree, f.tag, 16, "tag")
end

-- Each SPI on which the new gateway receives, old and new; a protocol of 0 ends the list.
local function dissect_new_spis(r, tree)
  while r.at < r.stop and r.tvb(r.at, 1):uint() ~= 0 do
    local protocol, item = add(r, tree, f.new_protocol, 1)
    local size = take(r, 1, "octets of an SPI"):uint()
    if SPI_SIZES[protocol:uint()] ~= size then
      item:add_proto_expert_info(e.malformed, "an SPI of " .. size .. " octets")
      return
    end
    add(r, item, f.new_old, size, "old SPI")
    add(r, item, f.new_new, size, "new SPI")
  end
  if not zero(r) then tree:add_proto_expert_info(e.malformed, "something behind the end of the list") end
end

-- Where SAs are that were handed on; a zero octet ends the list.
local function dissect_whereabouts(r, tree)
  while r.at < r.stop and r.tvb(r.at, 1):uint() ~= 0 do
    local _, item = add(r, tree, f.place, 1)
    local size = take(r, 1, "octets of the name"):uint()
    add(r, item, f.spi_i, 8, "SPI")
    add(r, item, f.spi_r, 8, "SPI")
    add(r, item, f.epoch, 8, "epoch")
    if size > 0 then item:add_packet_field(f.moved_to, take(r, size, "a gateway's name"), ENC_UTF_8) end
  end
  if not zero(r) then tree:add_proto_expert_info(e.malformed, "something behind the end of the list") end
end

local function dissect_block(r, tree, kind, profiles)
  local start = r.at
  local item = tree:add(f.block, r.tvb(start, math.min(4, r.stop - start)))
  local fpt = add(r, item, f.fpt, 2, "feature profile type"):uint()
  local units = add(r, item, f.units, 1, "block length"):uint()
  local p = add(r, item, f.p, 1, "block flags"):bitfield(0, 1) == 1
  local name = name_of(FPTS, fpt, "0x%04x")
  item:append_text(": " .. name)
  local size = math.max(units * 8, 4)
  if start + size > r.stop then
    item:add_proto_expert_info(e.malformed, "the block is longer than the message")
    r.at = r.stop
    return name
  end
  item:set_len(size)
  if p then
    if units == 0 then
      item:add_proto_expert_info(e.malformed, "a block of length 0 has no room for its presence vector")
      return name
    end
    add(r, item, f.presence, 4, "presence vector")
  end
  local inner = { tvb = r.tvb, at = r.at, stop = start + size }
  r.at = start + size
  if inner.at == inner.stop then return name end
  local range = inner.tvb(inner.at, inner.stop - inner.at)
  item:append_text(string.format(", %d octets", range:len()))
  local data = item:add(f.data, range)
  if fpt == MN_TOKEN then
    local fine, problem = pcall(dissect_token, inner, item, kind)
    if not fine then
      if problem ~= SHORT then error(problem, 0) end
      item:add_proto_expert_info(e.malformed, "the token ends within: " .. SHORT.what)
    elseif inner.stop - inner.at > 7 or not zero(inner) then
      item:add_proto_expert_info(e.malformed, "octets behind the token are not padding")
    end
  elseif (fpt == NEW_SPIS and kind == 2) or (fpt == WHEREABOUTS and kind == 3) then
    local fine, problem = pcall(fpt == NEW_SPIS and dissect_new_spis or dissect_whereabouts, inner, item)
    if not fine then
      if problem ~= SHORT then error(problem, 0) end
      item:add_proto_expert_info(e.malformed, "the list ends within: " .. SHORT.what)
    end
  elseif fpt == IKEV2_SA and (kind == 1 or kind == 7) and range:len() >= 16 then
    add(inner, item, f.spi_i, 8)
    add(inner, item, f.spi_r, 8)
  elseif JOINED[fpt] and JOINED[fpt]:find(kind, 1, true) then
    local found = profiles[fpt]
    if not found then
      found = { name = name, fpt = fpt, data = ByteArray.new(), blocks = 0 }
      profiles[fpt] = found
      table.insert(profiles, found)
    end
    found.data:append(range:bytes())
    found.blocks = found.blocks + 1
  elseif not FPTS[fpt] then
    data:add_proto_expert_info(e.unknown, "a feature profile type that is not known here")
  end
  return name
end

local function dissect_blocks(r, tree, kind)
  local names, profiles = {}, {}
  while r.at < r.stop do
    local name = dissect_block(r, tree, kind, profiles)
    if names[#names] ~= name then table.insert(names, name) end
  end
  return names, profiles
end

-- Another dissector's view, without its words in the columns.
local function show_as(name, tvb, pinfo, tree)
  local known, dissector = pcall(Dissector.get, name)
  if known and dissector then
    local protocol, info = tostring(pinfo.cols.protocol), tostring(pinfo.cols.info)
    pcall(dissector.call, dissector, tvb, pinfo, tree)
    pinfo.cols.protocol, pinfo.cols.info = protocol, info
  end
end

-- Datagrams of the MN, each behind its length; at most 7 octets of padding.
local function show_proof(tvb, pinfo, tree)
  local at = 0
  while tvb:len() - at >= 2 do
    local length = tvb(at, 2):uint()
    if length == 0 then break end
    local item = tree:add(f.proof, tvb(at, 2))
    if at + 2 + length > tvb:len() then
      item:add_proto_expert_info(e.malformed, "the datagram is longer than the blocks")
      return
    end
    local datagram = tvb(at + 2, length)
    if length >= 16 then
      item:add(f.spi_i, datagram(0, 8))
      item:add(f.spi_r, datagram(8, 8))
    end
    show_as("isakmp", datagram:tvb(), pinfo, item)
    at = at + 2 + length
  end
  if tvb:len() - at > 7 then
    tree:add_proto_expert_info(e.malformed, "octets behind the datagrams are not padding")
  end
end

-- A profile is one CBOR map.
local function show_joined(profiles, pinfo, tree)
  for _, profile in ipairs(profiles) do
    local tvb = profile.data:tvb(profile.name)
    if profile.fpt == PROOF then
      show_proof(tvb, pinfo, tree)
    else
      local item = tree:add(f.profile, tvb(), profile.name)
      item:append_text(string.format(": %d octets, %d blocks", tvb:len(), profile.blocks))
      show_as("cbor", tvb, pinfo, item)
    end
  end
end

local function dissect_statuses(r, tree, kind)
  local words = {}
  while r.at < r.stop do
    local fpt = r.stop - r.at > 1 and r.tvb(r.at, 2):uint() or 0
    if kind == 2 and (fpt == MN_TOKEN or fpt == NEW_SPIS or fpt == COOKIE) then break end -- blocks from here on
    if kind == 5 and fpt == REASON then break end
    local item = tree:add(f.status, r.tvb(r.at, math.min(4, r.stop - r.at)))
    fpt = add(r, item, f.status_fpt, 2, "feature profile type"):uint()
    local code = add(r, item, f.status_code, 1, "status"):uint()
    take(r, 1, "reserved octet")
    local text = name_of(FPTS, fpt, "0x%04x") .. " " .. name_of(STATUSES, code, "0x%02x")
    item:append_text(": " .. text)
    table.insert(words, text)
    if code ~= 0 then item:add_proto_expert_info(e.failed, text) end
  end
  return words
end

local function dissect_body(r, tree, kind, v4, words, profiles)
  if kind == 3 or kind == 4 then add(r, tree, f.elapsed, 4, "elapsed time") end
  table.insert(words, add_address(r, tree, v4, f.mn, f.mn6, "MN's previous address"))
  if kind == 1 then add_address(r, tree, v4, f.router, f.router6, "other router") end
  if kind == 1 or kind == 7 then
    table.insert(words, "seq " .. add(r, tree, f.sequence, 4, "sequence number"):uint())
    add(r, tree, f.token, 4, "token")
  end
  if kind == 4 then
    add(r, tree, f.algorithm, 2, "token algorithm")
    local size = add(r, tree, f.key_length, 2, "key length"):uint()
    if size > 0 then add(r, tree, f.key, size, "key") end
  end
  if kind == 2 or kind == 5 then
    for _, text in ipairs(dissect_statuses(r, tree, kind)) do table.insert(words, text) end
  end
  if kind == 6 then
    if r.at < r.stop then tree:add_proto_expert_info(e.malformed, "octets behind the end of a CTC") end
  elseif r.at < r.stop or kind ~= 5 then
    local names, found = dissect_blocks(r, tree, kind)
    for _, name in ipairs(names) do table.insert(words, name) end
    for _, profile in ipairs(found) do table.insert(profiles, profile) end
  end
end

local function dissect_message(tvb, pinfo, root)
  local first = tostring(pinfo.cols.protocol) ~= "CXTP"
  pinfo.cols.protocol = "CXTP"
  if first then pinfo.cols.info = "" end
  local tree = root:add(cxtp, tvb())
  local function give_up(text)
    tree:add_proto_expert_info(e.malformed, text)
    pinfo.cols.info:append("; malformed: " .. text)
    return tvb:len()
  end
  if tvb:len() < HEADER then return give_up("too short for a header") end
  local r = { tvb = tvb, at = HEADER, stop = tvb:len() }
  local version, kind = tvb(0, 1):bitfield(0, 4), tvb(0, 1):bitfield(4, 4)
  tree:add(f.version, tvb(0, 1))
  tree:add(f.type, tvb(0, 1))
  local v4 = tvb(1, 1):bitfield(0, 1) == 1
  tree:add(f.v, tvb(1, 1))
  if kind == 1 or kind == 3 or kind == 4 then tree:add(f.a, tvb(1, 1)) end
  if kind == 5 then tree:add(f.s, tvb(1, 1)) end
  tree:add(f.reserved, tvb(1, 1))
  tree:add(f.length, tvb(2, 2))
  local length = tvb(2, 2):uint()
  if version ~= 1 then return give_up("CXTP version " .. version) end
  if not TYPES[kind] then return give_up("message type " .. kind) end
  if length < HEADER then return give_up("length " .. length .. " is less than the header") end
  local whole = length == tvb:len()
  local words, profiles = { TYPES[kind] }, {}
  if kind == 5 and tvb(1, 1):bitfield(1, 1) == 1 then words[1] = "CTDR (all received)" end
  tree:append_text(", " .. TYPES[kind])
  if length < tvb:len() then r.stop = length end
  local fine, problem = pcall(dissect_body, r, tree, kind, v4, words, profiles)
  pinfo.cols.info:append((first and "" or "; ") .. table.concat(words, ", "))
  if not fine then
    if problem ~= SHORT then error(problem, 0) end
    return give_up("it ends within: " .. SHORT.what)
  end
  if not whole then return give_up("length " .. length .. " with " .. tvb:len() .. " octets") end
  show_joined(profiles, pinfo, tree)
  return tvb:len()
end

local function length_of(tvb, _, offset)
  local length = tvb(offset + 2, 2):uint()
  if tvb(offset, 1):bitfield(0, 4) ~= 1 or length < HEADER then
    return tvb:len() - offset -- framing is lost: nothing behind this can be told apart
  end
  return length
end

-- A stream, as it comes out of TCP or TLS. (A plain function: calling one dissector from another takes away
-- the right to ask for more octets.)
local function dissect_stream(tvb, _, root)
  if tvb:len() == 0 then return 0 end
  dissect_tcp_pdus(tvb, root, HEADER, length_of, dissect_message)
  return tvb:len()
end

cxtp.dissector = dissect_stream

-- UDP: one message a datagram.
local cxtp_udp = Proto("cxtp_udp", "Context Transfer Protocol over UDP")
function cxtp_udp.dissector(tvb, pinfo, root)
  return dissect_message(tvb, pinfo, root)
end

-- TCP: plain, or TLS on the same port. Records of TLS begin with 20 to 23, which are CXTP types as well, but
-- TLS has 3 in its second octet, where CXTP has flags, of which the lower six are 0.
local stream_number = Field.new("tcp.stream")
local in_tls = {}
local cxtp_tcp = Proto("cxtp_tcp", "Context Transfer Protocol over TCP")
function cxtp_tcp.init()
  in_tls = {}
end
function cxtp_tcp.dissector(tvb, pinfo, root)
  local number = stream_number()
  number = number and number.value or -1
  if tvb:len() >= 3 and tvb(0, 1):uint() == 22 and tvb(1, 1):uint() == 3 and tvb(2, 1):uint() <= 4 then
    in_tls[number] = true
  end
  if in_tls[number] then
    if pinfo.can_desegment > 0 then pinfo.can_desegment = 2 end -- the call takes one away
    return Dissector.get("tls"):call(tvb, pinfo, root)
  end
  return dissect_stream(tvb, pinfo, root)
end

DissectorTable.get("tcp.port"):add(PORT, cxtp_tcp)
DissectorTable.get("tls.port"):add(PORT, cxtp)
DissectorTable.get("udp.port"):add(PORT, cxtp_udp)

-- UPDATE_SPI ------------------------------------------------------------------------------------------

local update = Proto("update_spi", "IKEv2 UPDATE_SPI")
local u = {
  notify = ProtoField.uint16("update_spi.notify", "Notify", base.DEC, NOTIFIES),
  protocol = ProtoField.uint8("update_spi.protocol", "Protocol", base.DEC, PROTOCOLS),
  old = ProtoField.bytes("update_spi.old", "Old SPI"),
  new = ProtoField.bytes("update_spi.new", "New SPI"),
  choose = ProtoField.bool("update_spi.choose", "R: the receiver of the request chooses", 8, nil, 0x01),
  version = ProtoField.uint8("update_spi.version", "Version"),
  reason = ProtoField.uint8("update_spi.reason", "Reason", base.DEC, REASONS),
}
for _, field in pairs(u) do
  table.insert(update.fields, field)
end
local bad_notify =
  ProtoExpert.new("update_spi.malformed", "Malformed", expert.group.MALFORMED, expert.severity.ERROR)
local refused =
  ProtoExpert.new("update_spi.refused", "Refused", expert.group.RESPONSE_CODE, expert.severity.NOTE)
update.experts = { bad_notify, refused }

local notify_type = Field.new("isakmp.notify.msgtype")

-- `range`: the body of a notify payload (RFC 7296, 3.10): protocol, SPI size, type, SPI, data.
local function dissect_notify(range, tree)
  local kind, size = range(2, 2):uint(), range(1, 1):uint()
  local item = tree:add(update, range, "IKEv2 " .. NOTIFIES[kind])
  item:add(u.notify, range(2, 2))
  item:add(u.protocol, range(0, 1))
  local protocol = range(0, 1):uint()
  local left = range:len() - 4 - size
  local function bad(text)
    item:add_proto_expert_info(bad_notify, text)
    return NOTIFIES[kind] .. " (malformed)"
  end
  if left < 0 then return bad("the SPI is longer than the payload") end
  if kind == 41960 then
    if size ~= 0 or left < 1 then return bad("a version of one octet, and no SPI") end
    item:add(u.version, range(4, 1))
    return NOTIFIES[kind]
  end
  if SPI_SIZES[protocol] ~= size then
    return bad("an SPI of " .. size .. " octets for protocol " .. protocol)
  end
  item:add(u.old, range(4, size))
  local old = range(4, size):bytes():tohex(true)
  local text = string.format("%s %s %s", NOTIFIES[kind], name_of(PROTOCOLS, protocol), old)
  if kind == 41962 then
    if left ~= 1 then return bad("a reason of one octet") end
    local reason = name_of(REASONS, range(4 + size, 1):uint())
    item:add(u.reason, range(4 + size, 1))
    item:add_proto_expert_info(refused, reason)
    item:append_text(": " .. reason)
    return text .. ": " .. reason
  end
  if left ~= 4 and left ~= 4 + size then return bad("flags, three octets of 0, and a new SPI") end
  item:add(u.choose, range(4 + size, 1))
  if left == 4 then
    if range(4 + size, 1):bitfield(7, 1) == 0 then return bad("no new SPI, and nobody who chooses it") end
    return text .. " -> ?"
  end
  item:add(u.new, range(8 + size, size))
  local new = range(8 + size, size):bytes():tohex(true)
  item:append_text(": " .. old .. " -> " .. new)
  return text .. " -> " .. new
end

-- Wireshark has no table for notifies, so this looks at what its own dissector found, encrypted or not.
function update.dissector(_, pinfo, root)
  for _, found in ipairs({ notify_type() }) do
    local tvb = found.source
    if NOTIFIES[found.value] and found.len == 2 and tvb and found.offset >= 6 then
      local start = found.offset - 6 -- of the payload, with its generic header
      local length = tvb(start + 2, 2):uint()
      if length >= 8 and start + length <= tvb:len() then
        pinfo.cols.info:append(" " .. dissect_notify(tvb(start + 4, length - 4), root))
      end
    end
  end
end

register_postdissector(update)
