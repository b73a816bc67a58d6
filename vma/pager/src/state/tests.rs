use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::Digest;
use vmatrix_vma_image::memory::First;

const PAGES: u32 = 160;

/// Where a page lies in the tables of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Zero,
    /// In the working set, in this one of its packs.
    Set(u8),
    Rest(u8),
}

#[derive(Debug, Clone)]
enum Op {
    Fault {
        who: Who,
        page: u32,
    },
    /// Takes what is to be fetched.
    Ask,
    /// The nth thing under way comes, or does not.
    Land {
        nth: usize,
        well: bool,
    },
    Complete,
    Gone(Who),
    /// Somebody punches a hole.
    Lost(u32),
    Pause(bool),
    Pass(Duration),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (0..4u32, 0..PAGES).prop_map(|(who, page)| Op::Fault { who, page }),
        4 => Just(Op::Ask),
        4 => (0..8usize, prop::bool::weighted(0.8)).prop_map(|(nth, well)| Op::Land { nth, well }),
        1 => Just(Op::Complete),
        1 => (0..4u32).prop_map(Op::Gone),
        1 => (0..PAGES).prop_map(Op::Lost),
        1 => any::<bool>().prop_map(Op::Pause),
        2 => (0..500u64).prop_map(|ms| Op::Pass(Duration::from_millis(ms))),
    ]
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![Just(Place::Zero), (0..4u8).prop_map(Place::Set), (0..12u8).prop_map(Place::Rest)]
}

fn tables(places: &[Place]) -> (First, Rest) {
    let pages = |wanted: Place| (0..PAGES).filter(move |p| places[*p as usize] == wanted);
    let pack = |place: Place| {
        // Backwards, with an unused slot in front: nothing may rely on order.
        let slots: Vec<Option<u32>> =
            [None].into_iter().chain(pages(place).collect::<Vec<_>>().into_iter().rev().map(Some)).collect();
        let digest = Digest::of(format!("{place:?}").as_bytes());
        (slots.len() > 1).then_some(Pack { digest, stored: 200_000, slots })
    };
    let zero = pages(Place::Zero).map(|p| p..p + 1).collect();
    let set = (0..4).filter_map(|n| pack(Place::Set(n))).collect();
    (First { zero, packs: set }, Rest { packs: (0..12).filter_map(|n| pack(Place::Rest(n))).collect() })
}

/// A file and its guests, as they would be if all went right.
struct World {
    state: State,
    rest: Option<Rest>,
    private: bool,
    now: Duration,
    /// Pages of the file.
    file: BTreeSet<u32>,
    /// Who is blocked.
    blocked: BTreeSet<(Who, u32)>,
    under_way: Vec<Ask>,
}

impl World {
    fn new(places: &[Place], present: &BTreeSet<u32>, private: bool, want: Hydrate) -> World {
        let (first, rest) = tables(places);
        let mut bits = Bits::new(PAGES);
        // What a page of unknown place would hold is known only to the file.
        present.iter().for_each(|p| _ = bits.insert(*p));
        let state = State::new(Map::new(PAGES, first).unwrap(), want, bits);
        let (rest, file) = (Some(rest), present.clone());
        World { state, rest, private, now: Duration::ZERO, file, blocked: BTreeSet::new(), under_way: Vec::new() }
    }

    fn fault(&mut self, who: Who, page: u32) {
        self.blocked.insert((who, page));
        match self.state.fault(self.now, who, self.private, page) {
            Verdict::Wake => {
                assert!(self.file.contains(&page), "woken for page {page}, which is nowhere");
                self.blocked.remove(&(who, page));
            }
            Verdict::Zeros(run) => {
                assert!(run.contains(&page) && run.len() <= 16, "{run:?} for {page}");
                assert!(run.clone().all(|p| self.state.map.of(p) == Of::Zero), "{run:?} is not all zeros");
                assert!(self.private || run.len() == 1);
                if !self.private {
                    self.file.insert(page);
                    self.filled(page);
                }
                self.blocked.remove(&(who, page));
            }
            Verdict::Wait => {
                assert!(!self.file.contains(&page), "page {page} is there and is waited for");
                assert_ne!(self.state.map.of(page), Of::Zero);
            }
        }
    }

    fn filled(&mut self, page: u32) {
        let woken: BTreeSet<(Who, u32)> = self.state.filled(page).into_iter().map(|who| (who, page)).collect();
        let waited: BTreeSet<(Who, u32)> = self.blocked.iter().filter(|(_, p)| *p == page).copied().collect();
        assert!(self.state.map.of(page) == Of::Zero || woken == waited, "page {page}: woken {woken:?} of {waited:?}");
        woken.iter().for_each(|w| _ = self.blocked.remove(w));
    }

    fn ask(&mut self) {
        while let Some(ask) = self.state.next(self.now) {
            assert!(!self.under_way.contains(&ask), "{ask:?} is under way already");
            let waited = !self.state.waiting.is_empty();
            assert!(ask.class != Class::Background || !waited, "the background goes on while somebody waits");
            let pack = self.state.pack(ask.pack).unwrap();
            assert!(pack.pages().any(|(_, p)| !self.file.contains(&p)), "{ask:?} brings nothing new");
            self.under_way.push(ask);
            let out = |class| self.under_way.iter().filter(|a| a.class == class).count() as u64;
            assert!(out(Class::Miss) <= MISSES_MAX as u64);
            assert!((out(Class::Critical) - 1.min(out(Class::Critical))) * 200_000 < CRITICAL_BYTES);
            assert!((out(Class::Background) - 1.min(out(Class::Background))) * 200_000 < BACKGROUND_BYTES);
        }
    }

    fn land(&mut self, nth: usize, well: bool) {
        if self.under_way.is_empty() {
            return;
        }
        let ask = self.under_way.remove(nth % self.under_way.len());
        if !well {
            return self.state.failed(self.now, ask);
        }
        let pages = self.state.arrived(ask);
        for (slot, page) in pages {
            assert_eq!(self.state.map.of(page), Of::Pack { pack: ask.pack, slot: slot as u16 });
            assert!(self.file.insert(page), "page {page} is written over");
            self.filled(page);
        }
    }

    fn complete(&mut self) {
        let Some(rest) = self.rest.take() else { return };
        for (who, page) in self.state.complete(rest).unwrap() {
            assert!(self.blocked.contains(&(who, page)));
            self.fault(who, page);
        }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Fault { who, page } => self.fault(who, page),
            Op::Ask => self.ask(),
            Op::Land { nth, well } => self.land(nth, well),
            Op::Complete => self.complete(),
            Op::Gone(who) => {
                self.state.gone(who);
                self.blocked.retain(|(w, _)| *w != who);
            }
            Op::Lost(page) => {
                // As the engine finds out: a fault on a page that is thought to be there.
                if self.file.remove(&page) {
                    self.state.lost(page);
                }
            }
            Op::Pause(paused) => self.state.pause(paused),
            Op::Pass(time) => self.now += time,
        }
        let waiting: BTreeSet<(Who, u32)> =
            self.state.waiting.iter().flat_map(|(page, w)| w.who.iter().map(|who| (*who, *page))).collect();
        assert_eq!(waiting, self.blocked, "somebody waits whom nobody knows, or the other way round");
    }

    /// Everything works from now on.
    fn settle(&mut self) {
        self.complete();
        for _ in 0..200 {
            self.now += AGAIN.1;
            self.ask();
            while !self.under_way.is_empty() {
                self.land(0, true);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_fault_is_answered_with_the_right_page_and_no_page_is_written_twice(
        places in prop::collection::vec(place(), PAGES as usize),
        present in prop::collection::btree_set(0..PAGES, 0..40),
        (private, working_set, background, precise, notes) in any::<(bool, bool, bool, bool, bool)>(),
        mbit in prop::option::of(1..2000u64),
        background_from in any::<u32>(),
        ops in prop::collection::vec(op(), 0..120),
    ) {
        // Recording fetches nothing ahead.
        let (working_set, background) = (working_set && !precise, background && !precise);
        let want = Hydrate { working_set, background, background_mbit: mbit, background_from, precise, notes };
        let mut world = World::new(&places, &present, private, want);
        ops.into_iter().for_each(|op| world.step(op));
        world.state.pause(false);
        world.settle();
        prop_assert!(world.blocked.is_empty(), "still wait: {:?}", world.blocked);
        prop_assert_eq!(world.state.out, [0; 3]);
        let nonzero = (0..PAGES).filter(|p| places[*p as usize] != Place::Zero);
        let whole = nonzero.clone().all(|p| world.file.contains(&p));
        prop_assert_eq!(world.state.is_whole(), whole);
        if background {
            prop_assert!(whole, "the background left something out");
        }
        let set = nonzero.filter(|p| matches!(places[*p as usize], Place::Set(_)));
        let has_set = set.clone().all(|p| world.file.contains(&p));
        prop_assert_eq!(world.state.has_working_set(), has_set || !working_set);
        prop_assert!(has_set || !working_set);
        let recorded: BTreeMap<u32, usize> = world.state.recorded().iter().enumerate().map(|(i, p)| (*p, i)).collect();
        prop_assert_eq!(recorded.len(), world.state.recorded().len(), "a page was touched first twice");
        let missed: BTreeSet<u32> = world.state.missed().iter().copied().collect();
        prop_assert_eq!(missed.len(), world.state.missed().len(), "a page is noted twice");
        let foreseen = |p: &u32| !notes || !matches!(places[*p as usize], Place::Rest(_)) || !recorded.contains_key(p);
        prop_assert!(!missed.iter().any(foreseen), "{:?} are no misses", missed);
    }
}

#[test]
fn a_miss_is_asked_for_before_the_working_set_and_that_before_the_rest() {
    let mut places = vec![Place::Zero; PAGES as usize];
    places[0..10].fill(Place::Set(0));
    places[20..30].fill(Place::Rest(0));
    places[40..50].fill(Place::Rest(1));
    let mut world = World::new(&places, &BTreeSet::new(), true, Hydrate::default());
    world.complete();
    world.fault(0, 45);
    let order: Vec<Class> = std::iter::from_fn(|| world.state.next(Duration::ZERO)).map(|ask| ask.class).collect();
    assert_eq!(order, [Class::Miss, Class::Critical], "nothing goes ahead while somebody waits");
}

#[test]
fn a_pack_on_its_way_behind_others_is_asked_for_again_when_a_guest_misses_it() {
    let mut places = vec![Place::Zero; PAGES as usize];
    places[20..30].fill(Place::Rest(0));
    let mut world = World::new(&places, &BTreeSet::new(), true, Hydrate::default());
    world.complete();
    assert_eq!(world.state.next(Duration::ZERO), Some(Ask { pack: 0, class: Class::Background }));
    world.fault(0, 25);
    assert_eq!(world.state.next(Duration::ZERO), Some(Ask { pack: 0, class: Class::Miss }));
    assert_eq!(world.state.next(Duration::ZERO), None);
    assert_eq!(world.state.arrived(Ask { pack: 0, class: Class::Miss }).len(), 10);
}

/// Ten pages of the working set at 0, twenty of one pack of the rest at 20.
fn notes() -> World {
    let mut places = vec![Place::Zero; PAGES as usize];
    places[0..10].fill(Place::Set(0));
    places[20..40].fill(Place::Rest(0));
    World::new(&places, &BTreeSet::new(), true, Hydrate { notes: true, ..Hydrate::default() })
}

#[test]
fn what_nothing_foresaw_is_noted_in_order_and_zeros_and_the_working_set_never() {
    let mut world = notes();
    // Before the rest table is here nobody knows where these are.
    for page in [38, 21, 100, 5] {
        world.now += Duration::from_millis(1);
        world.fault(0, page);
    }
    assert_eq!(world.state.missed(), [0; 0]);
    world.complete();
    world.fault(0, 30);
    world.fault(1, 30);
    world.fault(0, 101);
    assert_eq!(world.state.missed(), [38, 21, 30]);
}

#[test]
fn a_neighbour_of_a_miss_is_held_apart_until_it_is_touched_or_the_background_brings_it() {
    let mut world = notes();
    world.complete();
    world.fault(0, 25);
    let miss = Ask { pack: 1, class: Class::Miss };
    assert_eq!(world.state.next(Duration::ZERO), Some(miss));
    world.under_way.push(miss);
    world.land(0, true);
    assert_eq!(world.file, BTreeSet::from([25]));
    assert!(world.state.is_held_apart(1) && !world.state.is_held_apart(0));
    world.fault(0, 26);
    assert_eq!(world.state.missed(), [25, 26]);
    world.settle();
    assert_eq!(world.file.range(20..40).count(), 20);
    assert!(!world.state.is_held_apart(1));
}

#[test]
fn a_page_that_was_there_and_was_given_back_is_no_miss() {
    let mut world = notes();
    world.settle();
    world.fault(0, 25);
    world.step(Op::Lost(25));
    world.fault(0, 25);
    assert!(world.blocked.contains(&(0, 25)));
    assert_eq!(world.state.missed(), [0; 0]);
}

#[test]
fn a_guest_that_reads_its_memory_through_fills_the_notes_and_then_has_whole_packs_again() {
    let pages = MISSED_MAX as u32 + 32;
    let pack = |first: u32| Pack {
        digest: Digest::of(&first.to_le_bytes()),
        stored: 1000,
        slots: (first..first + 16).map(Some).collect(),
    };
    let rest = Rest { packs: (0..pages / 16).map(|n| pack(n * 16)).collect() };
    let want = Hydrate { notes: true, ..Hydrate::default() };
    let mut state = State::new(Map::new(pages, First::default()).unwrap(), want, Bits::new(pages));
    state.complete(rest).unwrap();
    let mut put = Vec::new();
    for page in 0..pages {
        if state.fault(Duration::ZERO, 0, true, page) == Verdict::Wait {
            let ask = state.next(Duration::ZERO).unwrap();
            let slots = state.arrived(ask);
            slots.iter().for_each(|(_, page)| _ = state.filled(*page));
            put.push(slots.len());
        }
    }
    assert_eq!(state.missed().len(), MISSED_MAX);
    // The last page that is noted brings its neighbours, of which there are none left.
    assert_eq!(put, [vec![1; MISSED_MAX], vec![16, 16]].concat());
}
