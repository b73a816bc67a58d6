//! Who is where, and the score: exact sums, so that it costs the same to judge a move among ten machines and ten thousand.
//!
//! ```text
//!  level of a machine   x = taken / pool                          (of each kind)
//!  spread over machines σ = √(n Σx² − (Σx)²) / n
//!  score                    Σ w σ + conflict · sharers
//! ```
//! Levels are kept as integers (2⁻³⁰ of a pool) and their sums in 128 bits, so the score is a function of who is where,
//! and not of how it came about: what is undone is undone to the last bit. Candidates are judged in doubles, whose
//! whole numbers here stay below 2⁵³ and which see only + − × ÷ √: the same on every machine.
//!
//! The score is convex in the levels, so no change gains more than its slope says: Σ (∂score/∂x) Δx, four
//! multiplications, which rules most candidates out before a root is taken.

use super::{ALL, Instance, KINDS, Kind, Machine, Odd, Rules};

/// One pool, as a level. 2⁻³⁰ is a MiB of a PiB.
const ONE: i64 = 1 << 30;
/// The highest level told apart: 16,384 pools. With [`MACHINES_MAX`] it keeps n · Σx² under 2¹²²: 17 + 17 + 2·44.
const LEVEL_MAX: u128 = 1 << 44;
/// One network with more machines than this is not one network.
pub(super) const MACHINES_MAX: usize = 1 << 17;
/// Instances, and the most that one may need: their sum stays under 2⁵², which a double holds exactly.
pub(super) const INSTANCES_MAX: usize = 1 << 20;
pub(super) const NEED_MAX: u64 = 1 << 32;
/// Room above this is as good as endless: all instances together need less.
const ROOM_MAX: u64 = 1 << 52;
/// Gains smaller than this are rounding: scores are sums of a few numbers of about 1, which a double holds to 1e-16;
/// the root of such an error is 1e-8.
pub(super) const NOTHING: f64 = 1e-8;
/// No group: the instance may share a machine with anyone.
const ALONE: u32 = u32::MAX;

/// A machine and what is on it.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    /// Room, for an instance that is alone and for several.
    room: [[f64; KINDS]; 2],
    pool: [u64; KINDS],
    /// Level per unit taken, for an instance that is alone and for several.
    per: [[f64; KINDS]; 2],
    taken: [f64; KINDS],
    level: [f64; KINDS],
    exact: [i64; KINDS],
    /// Instances on it, ascending.
    pub here: Vec<u32>,
}

#[derive(Debug, Clone)]
pub(super) struct Item {
    pub needs: [f64; KINDS],
    pub at: u32,
    group: u32,
}

/// A network: machines and instances by number (in order of their names).
#[derive(Debug, Clone)]
pub(super) struct Ledger<'a> {
    pub spots: Vec<Spot>,
    pub items: Vec<Item>,
    pub machines: Vec<&'a Machine>,
    pub instances: Vec<&'a Instance>,
    weights: [f64; KINDS],
    conflict: f64,
    slow_down: u64,
    sum: [i128; KINDS],
    squares: [i128; KINDS],
    pub sharers: usize,
    score: f64,
    mean: [f64; KINDS],
    /// n Σx² − (Σx)², in pools.
    variance: [f64; KINDS],
    root: [f64; KINDS],
    /// Weight ÷ √variance: the slope of the score per level above the mean.
    pub slope: [f64; KINDS],
}

impl<'a> Ledger<'a> {
    pub fn new(machines: &'a [Machine], instances: &'a [Instance], rules: &Rules) -> Result<Ledger<'a>, Odd> {
        let mut ledger = Ledger::empty(machines, rules)?;
        if instances.len() > INSTANCES_MAX {
            return Err(Odd::TooMany { what: "instances", seen: instances.len(), max: INSTANCES_MAX });
        }
        let mut sorted: Vec<&Instance> = instances.iter().collect();
        sorted.sort_by(|a, b| a.id.cmp(&b.id));
        let mut group = 0;
        for (nth, instance) in sorted.iter().enumerate() {
            let last = nth.checked_sub(1).map(|i| sorted[i]);
            if last.is_some_and(|l| l.id == instance.id) {
                return Err(Odd::InstanceTwice(instance.id.clone()));
            }
            group += u32::from(last.is_some_and(|l| l.id.service != instance.id.service));
            let unknown = |_| Odd::Unknown { instance: instance.id.clone(), machine: instance.machine.clone() };
            let at = ledger.machines.binary_search_by(|m| m.id.cmp(&instance.machine)).map_err(unknown)? as u32;
            let needs = needs(instance)?;
            ledger.items.push(Item { needs, at, group: if instance.apart { group } else { ALONE } });
            let spot = &mut ledger.spots[at as usize];
            spot.here.push(nth as u32);
            (0..KINDS).for_each(|k| spot.taken[k] += needs[k]);
        }
        ledger.instances = sorted;
        ledger.sharers = (0..ledger.spots.len()).map(|m| ledger.sharers_on(m)).sum();
        for m in 0..ledger.spots.len() {
            ledger.relevel(m);
        }
        ledger.reckon();
        Ok(ledger)
    }

    fn empty(machines: &'a [Machine], rules: &Rules) -> Result<Ledger<'a>, Odd> {
        let scale = 0.0..=Rules::WEIGHT_MAX;
        if let Some(odd) = rules.weights.iter().chain([&rules.conflict]).find(|w| !scale.contains(*w)) {
            return Err(Odd::Weight(*odd));
        }
        if !(100..=1000).contains(&rules.slow_down) {
            return Err(Odd::SlowDown(rules.slow_down));
        }
        if machines.len() > MACHINES_MAX {
            return Err(Odd::TooMany { what: "machines", seen: machines.len(), max: MACHINES_MAX });
        }
        let mut sorted: Vec<&Machine> = machines.iter().collect();
        sorted.sort_by(|a, b| a.id.cmp(&b.id));
        if let Some(twice) = sorted.windows(2).find(|w| w[0].id == w[1].id) {
            return Err(Odd::MachineTwice(twice[0].id.clone()));
        }
        let mut spots = Vec::with_capacity(sorted.len());
        for machine in &sorted {
            let pool = machine.pool.by_kind();
            for (k, kind) in ALL.into_iter().enumerate() {
                if pool[k] == 0 && rules.weights[k] > 0.0 {
                    return Err(Odd::NoPool { machine: machine.id.clone(), kind });
                }
            }
            spots.push(Spot::empty(machine, rules.slow_down));
        }
        Ok(Ledger {
            spots,
            items: Vec::new(),
            machines: sorted,
            instances: Vec::new(),
            weights: rules.weights,
            conflict: rules.conflict,
            slow_down: rules.slow_down,
            sum: [0; KINDS],
            squares: [0; KINDS],
            sharers: 0,
            score: 0.0,
            mean: [0.0; KINDS],
            variance: [0.0; KINDS],
            root: [0.0; KINDS],
            slope: [0.0; KINDS],
        })
    }

    /// The score as it is.
    pub fn score(&self) -> f64 {
        self.score
    }

    /// How far a machine's level is above the mean.
    pub fn above(&self, m: usize, k: usize) -> f64 {
        self.spots[m].level[k] - self.mean[k]
    }

    /// The level of a machine as an integer, for orders that must not depend on how it came about.
    pub fn exact(&self, m: usize, k: usize) -> i64 {
        self.spots[m].exact[k]
    }

    /// What one unit of each kind taken from a machine as full as this one changes the score by, at most.
    pub fn relief(&self, m: usize) -> [f64; KINDS] {
        let spot = &self.spots[m];
        let per = &spot.per[usize::from(spot.here.len() > 1)];
        std::array::from_fn(|k| self.slope[k] * (spot.level[k] - self.mean[k]) * per[k])
    }

    /// What one more instance on a machine loses at least: for each unit of each kind, and however little it needs.
    pub fn rise(&self, m: usize) -> ([f64; KINDS], f64) {
        let spot = &self.spots[m];
        let per = &spot.per[usize::from(!spot.here.is_empty())];
        let slope: [f64; KINDS] = std::array::from_fn(|k| self.slope[k] * (spot.level[k] - self.mean[k]));
        // Whoever was alone is slowed down.
        let alone = (0..KINDS).map(|k| slope[k] * (spot.taken[k] * per[k] - spot.level[k])).sum();
        (std::array::from_fn(|k| slope[k] * per[k]), alone)
    }

    /// The spread of one kind.
    pub fn spread(&self, k: usize) -> f64 {
        self.weights[k] * self.root[k] / self.spots.len() as f64
    }

    /// What sharing counts.
    pub fn sharing(&self) -> f64 {
        self.conflict * self.sharers as f64
    }

    /// Works the score out again from the sums.
    fn reckon(&mut self) {
        let n = self.spots.len() as f64;
        let one = ONE as f64;
        self.score = self.sharing();
        for k in 0..KINDS {
            let (sum, squares) = (self.sum[k], self.squares[k]);
            self.mean[k] = if self.spots.is_empty() { 0.0 } else { sum as f64 / n / one };
            self.variance[k] = (self.spots.len() as i128 * squares - sum * sum) as f64 / (one * one);
            let root = self.variance[k].sqrt();
            self.root[k] = root;
            self.slope[k] = if root > 0.0 { self.weights[k] / root } else { 0.0 };
            self.score += if self.spots.is_empty() { 0.0 } else { self.weights[k] * root / n };
        }
    }

    /// Works the levels of a machine out again from what is taken.
    fn relevel(&mut self, m: usize) {
        let spot = &mut self.spots[m];
        for k in 0..KINDS {
            let slow = if k == Kind::Cpu as usize && spot.here.len() > 1 { self.slow_down } else { 100 };
            let taken = spot.taken[k] as u64 as u128 * u128::from(slow) * ONE as u128;
            let pool = u128::from(spot.pool[k]) * 100;
            let level = ((taken + pool / 2) / pool).min(LEVEL_MAX) as i64;
            self.sum[k] += i128::from(level) - i128::from(spot.exact[k]);
            self.squares[k] += i128::from(level).pow(2) - i128::from(spot.exact[k]).pow(2);
            spot.exact[k] = level;
            spot.level[k] = level as f64 / ONE as f64;
        }
    }

    /// Moves an instance.
    pub fn put(&mut self, i: u32, to: u32) {
        let (from, item) = (self.items[i as usize].at as usize, &mut self.items[i as usize]);
        item.at = to;
        let needs = item.needs;
        let to = to as usize;
        self.sharers -= self.sharers_on(from) + self.sharers_on(to);
        self.spots[from].here.retain(|j| *j != i);
        let at = self.spots[to].here.partition_point(|j| *j < i);
        self.spots[to].here.insert(at, i);
        for (k, needs) in needs.into_iter().enumerate() {
            self.spots[from].taken[k] -= needs;
            self.spots[to].taken[k] += needs;
        }
        self.sharers += self.sharers_on(from) + self.sharers_on(to);
        self.relevel(from);
        self.relevel(to);
        self.reckon();
    }

    /// Adds an instance that may share with anyone.
    pub fn add(&mut self, m: usize, needs: [f64; KINDS]) {
        let i = self.items.len() as u32;
        self.items.push(Item { needs, at: m as u32, group: ALONE });
        self.spots[m].here.push(i);
        (0..KINDS).for_each(|k| self.spots[m].taken[k] += needs[k]);
        self.relevel(m);
        self.reckon();
    }

    /// Instances on a machine beyond the first of their group. Instances of a group follow one another.
    fn sharers_on(&self, m: usize) -> usize {
        let groups = self.spots[m].here.iter().map(|i| self.items[*i as usize].group).filter(|g| *g != ALONE);
        let (mut last, mut sharers) = (ALONE, 0);
        for group in groups {
            sharers += usize::from(group == last);
            last = group;
        }
        sharers
    }

    /// Whether an instance has one of its group on machine `m`, `but` left aside.
    pub fn meets(&self, i: u32, m: usize, but: u32) -> bool {
        let group = self.items[i as usize].group;
        let like = |j: &u32| self.items[*j as usize].group == group && *j != i && *j != but;
        group != ALONE && self.spots[m].here.iter().any(like)
    }

    /// Whether two instances are to be apart.
    pub fn alike(&self, i: u32, j: u32) -> bool {
        let (a, b) = (self.items[i as usize].group, self.items[j as usize].group);
        a == b && a != ALONE
    }

    /// What is gained beyond evenness when an instance leaves its machine.
    pub fn parting(&self, i: u32) -> f64 {
        let shares = self.sharers > 0 && self.meets(i, self.items[i as usize].at as usize, i);
        if shares { self.conflict } else { 0.0 }
    }

    /// Whether a machine has room for `needs` more and `less` less.
    pub fn fits(&self, m: usize, needs: &[f64; KINDS], less: &[f64; KINDS], instances: usize) -> bool {
        let spot = &self.spots[m];
        let room = &spot.room[usize::from(instances > 1)];
        (0..KINDS).all(|k| spot.taken[k] - less[k] + needs[k] <= room[k])
    }

    /// What is left on a machine for one more instance.
    pub fn left(&self, m: usize) -> [f64; KINDS] {
        let spot = &self.spots[m];
        let room = &spot.room[usize::from(!spot.here.is_empty())];
        std::array::from_fn(|k| (room[k] - spot.taken[k]).max(0.0))
    }

    /// How levels of a machine change when it has `needs` more, `less` less, and so many instances.
    pub fn shift(&self, m: usize, needs: &[f64; KINDS], less: &[f64; KINDS], instances: usize) -> [f64; KINDS] {
        let spot = &self.spots[m];
        let per = &spot.per[usize::from(instances > 1)];
        std::array::from_fn(|k| (spot.taken[k] - less[k] + needs[k]) * per[k] - spot.level[k])
    }

    /// What changing the levels of a machine gains at most.
    pub fn promise(&self, m: usize, shift: &[f64; KINDS]) -> f64 {
        let level = &self.spots[m].level;
        -(0..KINDS).map(|k| self.slope[k] * (level[k] - self.mean[k]) * shift[k]).sum::<f64>()
    }

    /// What changing the levels of two machines gains, sharing left aside.
    pub fn gain(&self, a: usize, da: &[f64; KINDS], b: usize, db: &[f64; KINDS]) -> f64 {
        let (xa, xb) = (&self.spots[a].level, &self.spots[b].level);
        let n = self.spots.len() as f64;
        let mut gain = 0.0;
        for k in 0..KINDS {
            if self.weights[k] == 0.0 {
                continue;
            }
            let (ya, yb) = (xa[k] - self.mean[k], xb[k] - self.mean[k]);
            let both = da[k] + db[k];
            let change = n * (da[k] * (2.0 * ya + da[k]) + db[k] * (2.0 * yb + db[k])) - both * both;
            let after = (self.variance[k] + change).max(0.0);
            gain += self.weights[k] * (self.root[k] - after.sqrt());
        }
        gain / n
    }

    /// Whether a machine has room for an instance beside what is there.
    pub fn takes_beside(&self, i: u32, m: usize) -> bool {
        self.fits(m, &self.items[i as usize].needs, &[0.0; KINDS], self.spots[m].here.len() + 1)
    }

    /// Whether an instance can go to a machine as things are.
    pub fn takes(&self, i: u32, m: usize) -> bool {
        self.takes_beside(i, m) && !self.meets(i, m, i)
    }

    /// What moving an instance gains; none if it cannot go there.
    pub fn gain_of(&self, i: u32, to: usize) -> Option<f64> {
        let (item, none) = (&self.items[i as usize], [0.0; KINDS]);
        let from = item.at as usize;
        let da = self.shift(from, &none, &item.needs, self.spots[from].here.len() - 1);
        let db = self.shift(to, &item.needs, &none, self.spots[to].here.len() + 1);
        self.takes(i, to).then(|| self.gain(from, &da, to, &db) + self.parting(i))
    }

    /// Whether any instance takes any of a kind that has a weight.
    pub fn counts(&self, k: usize) -> bool {
        self.weights[k] > 0.0 && self.sum[k] > 0
    }
}

impl Spot {
    fn empty(machine: &Machine, slow_down: u64) -> Spot {
        let (room, pool) = (machine.room.by_kind(), machine.pool.by_kind());
        let slow = |k: usize, several: usize| if several == 1 && k == Kind::Cpu as usize { slow_down } else { 100 };
        let room = |s: usize| {
            std::array::from_fn(|k| {
                (u128::from(room[k]) * 100 / u128::from(slow(k, s))).min(u128::from(ROOM_MAX)) as f64
            })
        };
        let pool = pool.map(|p| p.max(1));
        let per = |s: usize| std::array::from_fn(|k| slow(k, s) as f64 / 100.0 / pool[k] as f64);
        Spot {
            room: [room(0), room(1)],
            per: [per(0), per(1)],
            pool,
            taken: [0.0; KINDS],
            level: [0.0; KINDS],
            exact: [0; KINDS],
            here: Vec::new(),
        }
    }
}

/// What an instance needs, in doubles.
fn needs(instance: &Instance) -> Result<[f64; KINDS], Odd> {
    let needs = instance.needs.by_kind();
    match ALL.into_iter().zip(needs).find(|(_, need)| *need > NEED_MAX) {
        Some((kind, seen)) => Err(Odd::TooLarge { instance: instance.id.clone(), kind, seen, max: NEED_MAX }),
        None => Ok(needs.map(|n| n as f64)),
    }
}
