/* One transfer between two gateways, as spin sees it: the old gateway s, the new gateway t, the link between
 * them, the mobile node, the operator. `python -m tests.model` writes the tables of ikectx/engine/tables.py in
 * front of it (the inlines source_table and target_table, and the sets OWNS, SERVES, ...), so that its
 * transitions are those of the code.
 *
 * FAULTS things may go wrong in one run, in any order and at any moment: an agent is killed, a host loses its
 * power, the link breaks (and what was on its way still arrives, or not), a step fails, a time limit passes too
 * early, the operator cancels, a store is lost, a message is doubled. After that all goes well, so that each run
 * has to end; a run that does not is a non-progress cycle, or an invalid end state.
 *
 * Checked after every step: never two owners, by the journals (SERVES, OWNS) and by the kernels (who can send).
 * Checked at the end: exactly one gateway can send, and it is the one that the journals name.
 */

#define NONE 255

/* What is on the way to t, and back. An answer belongs to the message that it answers, because a link keeps order. */
#define M_PCTD 1
#define M_CTD 2
#define M_CTC 3
#define M_REQUEST 4
#define M_YES_PCTD 5
#define M_NO_PCTD 6
#define M_YES_CTD 7
#define M_NO_CTD 8
#define M_DOUBT 9

/* Ways to begin: the network pushes, the mobile node announces, the mobile node is at t already. */
#define PUSH 1
#define HOLD 2
#define WHOLE 3

byte faults = FAULTS;
byte mode;

/* the journal's state, if what was to be written soon was written; without that; what a loss of power leaves of it */
byte s = S_NEW, s_row = S_NEW, s_disk = S_NEW;
short s_todo; byte s_in = NONE;		/* actions not done yet; an input that waits to be fed */
bool s_sends = true;			/* the kernel of the old gateway has an outbound policy */
bool s_has = true;			/* charon there has the SA */
byte t = T_NEW, t_row = T_NEW, t_disk = T_NEW;
short t_todo; byte t_in = NONE;
bool t_sends, t_has;
bool t_forgot;				/* its store was lost */
bool t_active;				/* its charon serves the SA: not PASSIVE, not mute */
bool t_denied;				/* ABORTED in memory only: it never heard of the transfer before */
byte t_asked, t_asked_over;		/* the message that is not answered yet, and the link that it came over */

bool up = true;
bit link;				/* tells one connection from the next */
chan to_t = [2] of { byte, bit };
chan to_s = [2] of { byte, bit };
bool doubted;				/* s was told that t does not know, and does not say no */
bool doomed;				/* a host lost its power, or charon the SA: there may be nothing left to own */
bool doubled;

/* of one step: inputs for the tables, which come once each at its end, so that the model stays small */
byte to_feed_s = NONE, to_feed_t = NONE;
byte mail, reply;
bit over, from;

#define feed_s(what) to_feed_s = what
#define feed_t(what) to_feed_t = what

inline post(channel, what) {
	if
	:: up && len(channel) < 2 -> channel!what, link
	:: !up || len(channel) == 2 -> skip
	fi
}

inline cut(keep) {
	up = false;
	link = 1 - link;
	do
	:: len(to_s) > 0 -> to_s?_, _
	:: len(to_s) == 0 -> break
	od;
	do
	:: !keep && len(to_t) > 0 -> to_t?_, _
	:: keep || len(to_t) == 0 -> break
	od
}

inline link_is_lost() {
	if
	:: s_in == NONE && s_todo == 0 -> feed_s(SI_LINK_LOST)
	:: else -> skip
	fi
}

/* One action of the old gateway. What follows from it is fed by a step of its own, so that a fault can come between. */
inline do_s() {
	if
	:: s_todo & SA_SEND_CTC -> s_todo = s_todo - SA_SEND_CTC; if :: mode != WHOLE -> post(to_t, M_CTC) :: else -> skip fi
	:: else ->
		if
		:: s_todo & SA_SEND_PCTD -> s_todo = s_todo - SA_SEND_PCTD;
			if
			:: up -> post(to_t, M_PCTD)
			:: else -> s_in = SI_LINK_LOST
			fi
		:: s_todo & SA_SEND_CTD -> s_todo = s_todo - SA_SEND_CTD;
			if
			:: up -> post(to_t, M_CTD)
			:: else -> s_in = SI_LINK_LOST
			fi
		:: s_todo & SA_RECONNECT -> s_todo = s_todo - SA_RECONNECT;
			if
			:: doubted -> skip /* told to its operator: an end of the model */
			:: else -> if :: !up -> up = true :: else -> skip fi; s_in = SI_LINK_UP
			fi
		:: s_todo & SA_DIVERT -> s_todo = s_todo - SA_DIVERT /* packets go another way; who may send stays */
		:: s_todo & SA_FREEZE -> s_todo = s_todo - SA_FREEZE;
			if
			:: s_sends = false; s_in = SI_OK
			:: faults > 0 -> faults--; s_in = SI_BUSY
			:: faults > 0 -> faults--; s_in = SI_FAILED
			:: faults > 0 -> faults--; s_sends = false; s_in = SI_FAILED
			fi
		:: s_todo & SA_THAW -> s_todo = s_todo - SA_THAW;
			if
			:: s_has -> s_sends = true; s_in = SI_OK
			:: !s_has -> s_in = SI_GONE; doomed = true
			:: faults > 0 -> faults--; s_in = SI_FAILED
			:: faults > 0 -> faults--; s_has = false; s_sends = false; doomed = true; s_in = SI_GONE
			fi
		:: s_todo & SA_RELEASE -> s_todo = s_todo - SA_RELEASE;
			if
			:: s_has = false; s_in = SI_OK
			:: faults > 0 -> faults--; s_in = SI_FAILED
			fi
		fi
	fi
}

inline answer() {
	if
	:: t_asked == 0 || t_asked_over != link -> skip /* that connection is gone */
	:: else ->
		if
		:: t_asked == M_PCTD && T_SAYS_YES(t) -> post(to_s, M_YES_PCTD)
		:: t_asked == M_PCTD && !T_SAYS_YES(t) -> post(to_s, M_NO_PCTD)
		:: t_asked == M_CTD && T_SAYS_YES(t) -> post(to_s, M_YES_CTD)
		:: t_asked == M_CTD && !T_SAYS_YES(t) -> post(to_s, M_NO_CTD)
		fi
	fi;
	t_asked = 0
}

inline does(what) {
	if
	:: what == TA_PREPARE -> t_has = true
	:: what == TA_TAKE -> t_sends = true
	:: what == TA_ACTIVATE -> t_active = true
	:: else -> skip
	fi
}

inline ends(what) {
	t_todo = t_todo - what;
	if
	:: !t_has && (what == TA_TAKE || what == TA_MOVE || what == TA_ACTIVATE) -> t_in = TI_FAILED /* it lost its power */
	:: t_has || what == TA_CHECK || what == TA_PREPARE -> does(what); t_in = TI_OK
	:: faults > 0 && (t_has || what == TA_PREPARE) -> faults--; does(what); t_in = TI_FAILED
	:: faults > 0 -> faults--; t_in = TI_FAILED
	fi
}

inline do_t() {
	if
	:: t_todo & TA_SEND_CTC -> t_todo = t_todo - TA_SEND_CTC; post(to_s, M_CTC)
	:: else ->
		if
		:: t_todo & TA_CHECK -> ends(TA_CHECK)
		:: t_todo & TA_PREPARE -> ends(TA_PREPARE)
		:: t_todo & TA_REQUEST -> t_todo = t_todo - TA_REQUEST; post(to_s, M_REQUEST)
		:: t_todo & TA_TAKE -> ends(TA_TAKE)
		:: t_todo & TA_MOVE -> ends(TA_MOVE)
		:: t_todo & TA_ACTIVATE -> ends(TA_ACTIVATE)
		:: t_todo & TA_UNDO -> t_todo = t_todo - TA_UNDO;
			if
			:: t_sends = false; t_has = false; t_active = false; t_in = TI_OK
			:: faults > 0 -> faults--; t_sends = false; t_in = TI_FAILED
			:: faults > 0 -> faults--; t_in = TI_FAILED
			fi
		:: t_todo & TA_ANSWER -> t_todo = t_todo - TA_ANSWER; answer()
		fi
	fi
}

inline take_mail() {
	to_t?mail, over;
	if
	:: mail == M_PCTD ->
		t_asked = mail; t_asked_over = over;
		feed_t((mode == HOLD -> TI_ANNOUNCE : TI_PCTD))
	:: mail == M_CTD ->
		t_asked = mail; t_asked_over = over;
		if
		:: t == T_NEW && t_forgot && t_has && t_active -> /* its charon serves it: written down again */
			t = T_OWNED; t_row = T_OWNED; t_disk = T_OWNED;
			if :: over == link -> post(to_s, M_YES_CTD) :: else -> skip fi;
			t_asked = 0
		:: t == T_NEW && t_forgot && t_has && !t_active -> /* its charon has it: neither yes nor no */
			if :: over == link -> post(to_s, M_DOUBT) :: else -> skip fi;
			t_asked = 0
		:: else ->
			if
			:: t == T_NEW && mode != WHOLE -> t_denied = true
			:: else -> skip
			fi;
			feed_t((mode == WHOLE -> TI_WHOLE : TI_CTD))
		fi
	:: mail == M_CTD && faults > 0 && t != T_NEW && mode != WHOLE ->
		faults--; t_asked = mail; t_asked_over = over; feed_t(TI_MISFIT)
	:: mail == M_CTC ->
		feed_t(TI_CTC)
	fi
}

inline take_answer() {
	to_s?reply, from;
	if
	:: (reply == M_YES_PCTD || reply == M_NO_PCTD) && (s == S_OFFERED || s == S_ANNOUNCED) && from == link ->
		feed_s((reply == M_YES_PCTD -> SI_ACCEPTED : SI_REJECTED))
	:: (reply == M_YES_CTD || reply == M_NO_CTD) && s == S_RELEASED && from == link ->
		feed_s((reply == M_YES_CTD -> SI_ACCEPTED : SI_REJECTED))
	:: reply == M_DOUBT && s == S_RELEASED && from == link -> doubted = true; feed_s(SI_DOUBTED)
	:: reply == M_CTC -> feed_s(SI_CTC)
	:: reply == M_REQUEST -> feed_s(SI_REQUESTED)
	:: else -> skip
	fi
}

inline kill_s() {
	s_todo = 0; s_in = NONE;
	if
	:: cut(true)
	:: cut(false)
	fi;
	s_in = SI_RESTART
}

inline kill_t() {
	t_todo = 0; t_in = NONE; t_asked = 0;
	cut(false);
	if
	:: t_denied -> t_denied = false; t = T_NEW
	:: else -> skip
	fi;
	t_in = TI_RESTART;
	link_is_lost()
}

#define IDLE_S (s_todo == 0 && s_in == NONE)
#define IDLE_T (t_todo == 0 && t_in == NONE)
#define OVER (IDLE_S && IDLE_T && len(to_t) == 0 && len(to_s) == 0 && (S_IS_FINAL(s) || doubted) && (T_IS_FINAL(t) || t == T_NEW))
#define LATE_S (S_HAS_TIMER(s) && IDLE_S)
#define LATE_T (T_HAS_TIMER(t) && IDLE_T)

active proctype world() {
	if
	:: mode = PUSH; s_in = SI_OK
	:: mode = HOLD; s_in = SI_ANNOUNCE
	:: mode = WHOLE; s_in = SI_REQUESTED
	fi;
	do
	:: OVER -> break
	:: else ->
		atomic {
			if
			/* what the agents do */
			:: s_todo != 0 -> do_s()
			:: s_todo == 0 && s_in != NONE -> feed_s(s_in); s_in = NONE
			:: t_todo != 0 -> do_t()
			:: t_todo == 0 && t_in != NONE -> feed_t(t_in); t_in = NONE
			/* what arrives */
			:: IDLE_T && len(to_t) > 0 -> take_mail()
			:: IDLE_S && len(to_s) > 0 -> take_answer()
			:: IDLE_T && mode == HOLD && t == T_HELD -> feed_t(TI_ARRIVED)
			/* limits of time: too early is a fault, and they pass when nothing else can happen */
			:: faults > 0 && LATE_S -> faults--; feed_s(SI_TIMEOUT)
			:: faults > 0 && LATE_T -> faults--; feed_t(TI_TIMEOUT)
			:: IDLE_S && IDLE_T && len(to_t) == 0 && len(to_s) == 0 && LATE_T && t != T_HELD -> feed_t(TI_TIMEOUT)
			:: IDLE_S && IDLE_T && len(to_t) == 0 && len(to_s) == 0 && LATE_S && !doubted -> feed_s(SI_TIMEOUT)
			/* faults */
			:: faults > 0 && up -> faults--; if :: cut(true) :: cut(false) fi; link_is_lost()
			:: faults > 0 -> faults--; kill_s()
			:: faults > 0 -> faults--; kill_t()
			:: faults > 0 && s != s_row -> faults--; s = s_row; kill_s()
			:: faults > 0 && t != t_row -> faults--; t = t_row; kill_t()
			:: faults > 0 -> faults--; s = s_disk; s_row = s_disk; s_sends = false; s_has = false; doomed = true; kill_s()
			:: faults > 0 -> faults--; if :: t_sends || OWNS(t) -> doomed = true :: else -> skip fi;
				t = t_disk; t_row = t_disk; t_sends = false; t_has = false; t_active = false; kill_t()
			:: faults > 0 && !t_forgot -> faults--; t_forgot = true; t = T_NEW; t_row = T_NEW; t_disk = T_NEW; t_denied = false; kill_t()
			:: faults > 0 && IDLE_S -> faults--; feed_s(SI_CANCEL)
			:: faults > 0 && s == S_FREEZING && s_in == SI_OK -> faults--; s_in = SI_CANCEL
			:: faults > 0 && IDLE_S && s == S_RELEASED && t == T_ABORTED && !t_denied -> faults--; feed_s(SI_RECLAIM)
			:: faults > 0 && IDLE_S && s == S_RELEASED && t == T_OWNED -> faults--; feed_s(SI_GIVE_UP)
			:: faults > 0 && !doubled && len(to_t) == 1 -> faults--; doubled = true;
				to_t?<mail, over>; to_t!mail, over; mail = 0; over = 0
			fi;
			if
			:: to_feed_s != NONE -> source_table(to_feed_s); to_feed_s = NONE;
				if :: S_IS_SOON(s) -> skip :: else -> s_row = s fi;
				if :: S_IS_DURABLE(s) -> s_disk = s :: else -> skip fi
			:: else -> skip
			fi;
			if
			:: to_feed_t != NONE -> target_table(to_feed_t); to_feed_t = NONE;
				if :: T_IS_SOON(t) -> skip :: else -> t_row = t fi;
				if :: T_IS_DURABLE(t) -> t_disk = t :: else -> skip fi
			:: else -> skip
			fi;
			assert(!(SERVES(s) && OWNS(t)));
			assert(!(s_sends && t_sends))
		}
	od;
	/* exactly one gateway can send, and it is the one that the journals name */
	assert(doomed || doubted || t_forgot || s_sends != t_sends);
	assert(doomed || doubted || t_forgot || s_sends == SERVES(s));
	assert(doomed || doubted || t_forgot || t_sends == OWNS(t))
}
