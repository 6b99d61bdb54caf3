/*
 * Model of the handover (agent/migration/handover.h, docs/handover.md).
 *
 * Two sides, each with a volatile state and a durable journal. The network holds at most one copy of each kind of
 * message, and that copy may be delivered any number of times, at any later moment, in any order, or be lost: this
 * covers loss, duplication, delay and reordering. Either process may die at any moment and start again from its journal
 * (the VMM it looked after stays as it is), also in the middle of a write, which then is or is not in the journal. The
 * destination's host may be lost for good; then somebody may confirm that it is fenced.
 *
 * Safety:   never two guests run, and never may both sides run it (asserted at every step).
 * Liveness: once faults stop, the guest runs somewhere for good, unless it was lost with the destination's host.
 *
 * MUTANT selects a broken variant that has to be caught:
 *   1  the destination may write OWNER after REFUSED
 *   2  the source resumes after YIELDED when it has waited long enough
 *   3  Yield is sent before YIELDED is durable
 *   4  the destination does not wait for Yield
 *   5  fencing is confirmed although the destination is alive
 *   6  (liveness) the source does not ask after YIELDED
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifdef LIVENESS /* costs ten times as much a state */
#define CRASHES 1
#define LOSSES 1
#else
#define CRASHES 2 /* of each side */
#define LOSSES 3
#endif

mtype = {RUNNING, FROZEN, YIELDING, YIELDED, HEARD_NO, MAY_RESUME, HEARD_OWNER, RELEASED};
mtype = {WAITING, OWNING, OWNER, REFUSING, REFUSED, GONE};

/* Source: process, guest, journal. */
mtype s = RUNNING;
bool guest_s = true;
bool s_gave_up = false;
bool all_sent = false, yield_sent = false;
bool fencing = false;
bool js_yielded = false, js_refused = false, js_released = false;

/* Destination. */
mtype d = WAITING;
bool guest_d = false;
bool d_checked = false, yield_heard = false, d_gave_up = false, verdict_sent = false;
bool jd_owner = false, jd_refused = false;

/* Which faults this run has. Chosen once: fairness would otherwise force every fault to happen in the end. */
bool host_may_be_lost, refuses_at_will;
byte source_crashes, destination_crashes, losses;

/* Network. */
bool n_state = false, n_yield = false, n_query = false, n_owner = false, n_refused = false;

#define s_may ((s == RUNNING) || (s == FROZEN) || (s == MAY_RESUME))
#define d_may (d == OWNER)
#define CHECK assert(!(guest_s && guest_d) && !(s_may && d_may))

inline recover_source() {
  all_sent = false;
  s_gave_up = true; /* what was sent died with the connection */
  if
  :: js_released -> s = RELEASED
  :: else ->
    if
    :: js_yielded && !js_refused -> s = YIELDED
    :: js_yielded && js_refused -> s = MAY_RESUME
    :: else -> s = RUNNING
    fi
  fi
}

inline recover_destination() {
  d_checked = false;
  yield_heard = false;
  d_gave_up = true;
  if
  :: jd_owner -> d = OWNER
  :: jd_refused -> d = REFUSED
  :: else -> d = WAITING
  fi
}

proctype Source() {
end:
  do
  :: atomic { s == RUNNING && guest_s && !s_gave_up -> guest_s = false; s = FROZEN; CHECK }
  :: atomic { s == FROZEN && !s_gave_up -> s = YIELDING }
  :: atomic { s == YIELDING -> js_yielded = true; s = YIELDED; CHECK }
  :: atomic { s == YIELDING -> s = FROZEN; s_gave_up = true; CHECK } /* the write failed for certain */
  :: atomic { (s == FROZEN || s == YIELDING || s == YIELDED) && !all_sent && !s_gave_up -> all_sent = true; n_state = true }
#if MUTANT == 3
  :: atomic { (s == YIELDING || s == YIELDED) && all_sent && !yield_sent -> yield_sent = true; n_yield = true }
#else
  :: atomic { s == YIELDED && all_sent && !yield_sent -> yield_sent = true; n_yield = true }
#endif
#if MUTANT != 6
  :: atomic { s == YIELDED && !n_query && !n_owner && !n_refused -> n_query = true }
#endif
  :: atomic { n_owner && s == YIELDED -> s = HEARD_OWNER; CHECK }
  :: atomic { n_refused && s == YIELDED -> s = HEARD_NO }
  :: atomic { n_refused && (s == RUNNING || s == FROZEN) && !s_gave_up -> s_gave_up = true }
  :: atomic { s == HEARD_NO -> js_refused = true; s = MAY_RESUME; CHECK }
  :: atomic { s == HEARD_OWNER -> js_released = true; s = RELEASED }
  :: atomic { s_may && !guest_s && (s_gave_up || s == MAY_RESUME) ->
      if :: s == FROZEN -> s = RUNNING :: else fi; guest_s = true; CHECK }
#if MUTANT == 2
  :: atomic { s == YIELDED -> guest_s = true; CHECK }
#endif
#if MUTANT == 5
  :: atomic { s == YIELDED -> fencing = true; s = HEARD_NO }
#else
  :: atomic { s == YIELDED && d == GONE -> fencing = true; s = HEARD_NO } /* an operator's confirmation */
#endif
  :: atomic { !s_gave_up && (s == RUNNING || s == FROZEN) -> s_gave_up = true } /* cancel, or connection lost */
  :: atomic { source_crashes > 0 && s == YIELDING -> source_crashes--; js_yielded = true; recover_source(); CHECK }
  :: atomic { source_crashes > 0 -> source_crashes--; recover_source(); CHECK }
  od
}

proctype Destination() {
end:
  do
  :: atomic { d != GONE && n_state && d == WAITING && !d_checked && !d_gave_up -> d_checked = true }
  :: atomic { d != GONE && n_yield && !yield_heard && d == WAITING -> yield_heard = true }
#if MUTANT == 4
  :: atomic { d == WAITING && d_checked && !d_gave_up -> d = OWNING }
#else
  :: atomic { d == WAITING && d_checked && yield_heard && !d_gave_up -> d = OWNING }
#endif
#if MUTANT == 1
  :: atomic { d == REFUSED && d_checked && yield_heard -> d = OWNING }
#endif
  :: atomic { d == OWNING -> jd_owner = true; d = OWNER; CHECK }
  :: atomic { d == OWNING -> d = WAITING; d_gave_up = true } /* the write failed for certain */
  :: atomic { d == OWNER && !guest_d -> guest_d = true; CHECK }
  :: atomic { d == OWNER && guest_d && !verdict_sent -> verdict_sent = true; n_owner = true }
  :: atomic { d == WAITING && (d_gave_up || refuses_at_will) -> d = REFUSING }
  :: atomic { d == REFUSING -> jd_refused = true; d = REFUSED; n_refused = true }
  /* Who asks has lost the connection: what is not complete is given up. */
  :: atomic { n_query && d == WAITING && !(d_checked && yield_heard) && !d_gave_up -> d_gave_up = true }
  :: atomic { n_query && d == OWNER -> n_query = false; n_owner = true }
  :: atomic { n_query && d == REFUSED -> n_query = false; n_refused = true }
  :: atomic { destination_crashes > 0 && d == OWNING -> destination_crashes--; jd_owner = true; recover_destination(); CHECK }
  :: atomic { destination_crashes > 0 && d == REFUSING -> destination_crashes--; jd_refused = true; recover_destination() }
  :: atomic { destination_crashes > 0 && d != GONE -> destination_crashes--; recover_destination(); CHECK }
  :: atomic { d != GONE && host_may_be_lost -> d = GONE; guest_d = false } /* lost for good */
  od
}

proctype Network() {
end:
  do
  :: atomic { losses > 0 && n_state -> losses--; n_state = false }
  :: atomic { losses > 0 && n_yield -> losses--; n_yield = false }
  :: atomic { losses > 0 && n_query -> losses--; n_query = false }
  :: atomic { losses > 0 && n_owner -> losses--; n_owner = false }
  :: atomic { losses > 0 && n_refused -> losses--; n_refused = false }
  od
}

#ifdef LIVENESS
/* Under fairness spin does not see a run that ends as one that goes on for ever doing nothing; this makes it one. */
bool tick = false;
proctype Idle() {
end:
  do
  :: tick = !tick
  od
}
#endif

init {
  atomic {
    if :: host_may_be_lost = true :: host_may_be_lost = false fi;
    if :: refuses_at_will = true :: refuses_at_will = false fi;
    select(source_crashes : 0 .. CRASHES);
    select(destination_crashes : 0 .. CRASHES);
    select(losses : 0 .. LOSSES);
    run Source();
    run Destination();
    run Network();
#ifdef LIVENESS
    run Idle()
#endif
  }
}

/* Nobody but the host that was lost for good may take the guest with it. */
#define runs (guest_s || guest_d)
#define lost_with_host (d == GONE && (s == HEARD_OWNER || s == RELEASED))
#ifdef LIVENESS
ltl settles { <> [] (runs || lost_with_host) }
#endif
