//! How many machines for a loss target: Erlang's formula B, and pools that services with different peaks share (paper
//! §6.1.1: as few requests for a VM as possible are to find no machine free).
//!
//! ```text
//!  offered load, loss target ─▶ instances_for ─▶ machines
//!  services × slots of a week ─┬▶ sum of each slot ──▶ machines for the greatest ─▶ shared
//!                              └▶ each service's peak ─▶ machines for each, summed ─▶ dedicated
//! ```
//!
//! # The model
//!
//! 1. A request is for one VM, which takes one machine to itself (a machine that holds k at once counts as k). It
//!    comes at a random moment, holds the machine for some time, and is lost if none is free.
//! 2. The load offered is requests an hour times the hours that one holds: the machines that would be busy if there
//!    were enough, in erlangs. Of the holding times only the mean matters (Erlang B is insensitive to their law).
//! 3. Any machine of a shared pool can run any service of it, so loads add up; a service that may not share
//!    ([`Service::alone`]) has machines of its own beside the pool.
//! 4. Every slot is long against the holding times. Where it is not, what is left of one slot meets the load of the
//!    next: then offer for each slot what is in progress in it.
//! 5. Requests come independently of each other. A crowd does not: it is a greater load, not chance.
//!
//! # The paper's stock and sport
//!
//! "100 machines on weekdays and 5 at weekends" is what a service *needs*, and a service with a loss target needs more
//! machines than it has load. So the load behind a number of machines is the greatest they carry ([`carries`]): at a
//! loss of 10⁻⁴ it is 69.3 erlangs for 100 machines, 2.3 for 10 and 0.5 for 5. The pool for 69.3 + 2.3 on weekdays and
//! 0.5 + 69.3 at weekends has 103 machines, against 200 dedicated. Without chance (each needs its machines at all
//! times) it is 100 + 10 = 110; with the numbers taken as erlangs, 148 against 274.
//!
//! That is for machines held an hour. If stock holds its own for 8, they are still held when sport's weekend begins: of
//! 103 machines 2 % of requests then find none (`bench placement`), and it takes the load in progress and 161 of them.

/// Largest load, thousandths of an erlang: 10⁹ erlangs, one request in progress for every eighth person alive.
pub const OFFERED_MAX: u64 = 1_000_000_000_000;
/// Most slots: the minutes of a week.
const SLOTS_MAX: usize = 10_080;
/// All of a million.
const ALL_PPM: u32 = 1_000_000;
/// How far below the load the recurrence begins, in square roots of the load, if that is above 0. There B(n) is near
/// 1 − n/A, and by every step what is wrong with it shrinks by 1 − B: over c square roots by e^(−c²/2), at 9 by
/// 10⁻¹⁷, below the last bit of a float. So 10⁹ erlangs take half a million steps and not 10⁹.
const RUN_UP: u64 = 9;

/// Why there is no number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPool {
    #[error(
        "a load of {} erlangs{} is beyond {}", .offered / 1000, .slot.map(|s| format!(" in slot {s}")).unwrap_or_default(), OFFERED_MAX / 1000
    )]
    Offered { offered: u64, slot: Option<usize> },
    #[error("a loss of 0 takes machines without end\n\nhint: ask for 1 in a million or more")]
    NoLoss,
    #[error(
        "service {service} has loads for {seen} slots, and service 0 for {slots}\n\nhint: one for each slot, 0 where it rests"
    )]
    Slots { service: usize, seen: usize, slots: usize },
    #[error("there are {seen} slots, and it takes 1 to {most}", most = SLOTS_MAX)]
    SlotCount { seen: usize },
}

/// B(n) for rising n, from Erlang's recurrence B(n) = A·B(n−1) / (n + A·B(n−1)), which only ever adds what is above 0
/// and so loses nothing. Four operations of IEEE 754 in a fixed order: the same bits on every machine.
struct Loss {
    load: f64,
    n: u64,
    b: f64,
}

impl Loss {
    /// Near B(n), and exact from `from` on.
    fn before(offered: u64, from: u64) -> Result<Loss, NoPool> {
        if offered > OFFERED_MAX {
            return Err(NoPool::Offered { offered, slot: None });
        }
        let (load, erlangs) = (offered as f64 / 1000.0, offered / 1000);
        let n = erlangs.min(from).saturating_sub(RUN_UP * (erlangs.isqrt() + 1));
        Ok(Loss { load, n, b: if n == 0 { 1.0 } else { 1.0 - n as f64 / load } })
    }

    fn step(&mut self) {
        self.n += 1;
        let lost = self.load * self.b;
        self.b = lost / (self.n as f64 + lost);
    }

    fn ppm(&self) -> f64 {
        self.b * f64::from(ALL_PPM)
    }
}

/// The fewest machines that lose at most `loss_ppm` in a million requests of a load of so many thousandths of an
/// erlang (paper §6.1.1). Takes steps in the order of the load's square root.
///
/// # Errors
/// A load above 10⁹ erlangs, or a loss of 0.
pub fn instances_for(offered: u64, loss_ppm: u32) -> Result<u64, NoPool> {
    if loss_ppm == 0 {
        return Err(NoPool::NoLoss);
    }
    // Machines that are always busy would lose what they cannot carry, 1 − n/A; with chance it is more. So the answer
    // is not below the load that is to be carried.
    let carried = u128::from(offered) * u128::from(ALL_PPM.saturating_sub(loss_ppm));
    let mut loss = Loss::before(offered, (carried / 1_000_000_000) as u64)?;
    if offered == 0 {
        return Ok(0);
    }
    while loss.ppm() > f64::from(loss_ppm) {
        loss.step();
    }
    Ok(loss.n)
}

/// Requests lost of a million, rounded up, when so many machines are offered so many thousandths of an erlang: at
/// least 1 where there is any load.
///
/// # Errors
/// A load above 10⁹ erlangs.
pub fn loss_ppm(offered: u64, count: u64) -> Result<u32, NoPool> {
    let mut loss = Loss::before(offered, count)?;
    if offered == 0 {
        return Ok(0);
    }
    // Below one in a million it only falls: the rest need not be walked.
    while loss.n < count && loss.ppm() > 1.0 {
        loss.step();
    }
    Ok(loss.ppm().ceil() as u32)
}

/// The greatest load, in thousandths of an erlang, of which so many machines lose at most `loss_ppm`: what is behind a
/// number of machines that somebody says a service needs. By halving, some 40 times [`loss_ppm`].
///
/// # Errors
/// A loss of 0.
pub fn carries(count: u64, loss: u32) -> Result<u64, NoPool> {
    if loss == 0 {
        return Err(NoPool::NoLoss);
    }
    let (mut can, mut cannot) = (0, OFFERED_MAX + 1);
    while cannot - can > 1 {
        let middle = can + (cannot - can) / 2;
        if loss_ppm(middle, count)? <= loss {
            can = middle;
        } else {
            cannot = middle;
        }
    }
    Ok(can)
}

/// One service's load in every slot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// Thousandths of an erlang for each slot, the same slots for all services.
    pub offered: Vec<u64>,
    /// Whether it may not share: hardware of its own, or an owner who asks for it.
    pub alone: bool,
}

/// What a set of services takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Machines if all that may share do: the pool, and those of each service that may not.
    pub machines: u64,
    /// The pool alone.
    pub shared: u64,
    /// The slot that the pool is sized for: the first of those with the greatest load.
    pub slot: usize,
    /// Machines of each service if none shares, for its own greatest load.
    pub own: Vec<u64>,
}

impl Pool {
    /// Machines if none shares.
    pub fn dedicated(&self) -> u64 {
        self.own.iter().sum()
    }
}

/// The machines under which no slot loses more than `loss_ppm` of a million, shared and dedicated.
///
/// A pool loses the same part of every service's requests, for all of them look at the same machines: a service is
/// never worse off for what the others ask.
///
/// # Errors
/// Says which service or slot is wrong.
pub fn pool(services: &[Service], loss_ppm: u32) -> Result<Pool, NoPool> {
    let slots = services.first().map_or(1, |s| s.offered.len());
    if !(1..=SLOTS_MAX).contains(&slots) {
        return Err(NoPool::SlotCount { seen: slots });
    }
    let mut sums = vec![0_u64; slots];
    let mut own = Vec::with_capacity(services.len());
    for (i, service) in services.iter().enumerate() {
        if service.offered.len() != slots {
            return Err(NoPool::Slots { service: i, seen: service.offered.len(), slots });
        }
        own.push(instances_for(service.offered.iter().copied().max().unwrap_or(0), loss_ppm)?);
        if !service.alone {
            sums.iter_mut().zip(&service.offered).for_each(|(sum, o)| *sum = sum.saturating_add(*o));
        }
    }
    let (slot, greatest) = sums.iter().copied().enumerate().rev().max_by_key(|s| s.1).unwrap_or_default();
    let shared = instances_for(greatest, loss_ppm).map_err(|e| match e {
        NoPool::Offered { offered, .. } => NoPool::Offered { offered, slot: Some(slot) },
        other => other,
    })?;
    let alone: u64 = services.iter().zip(&own).filter(|(s, _)| s.alone).map(|(_, n)| n).sum();
    Ok(Pool { machines: shared + alone, shared, slot, own })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One in ten thousand.
    const TARGET: u32 = 100;

    /// The recurrence from its beginning, B(0) = 1.
    fn plainly(offered: u64, count: u64) -> f64 {
        let load = offered as f64 / 1000.0;
        (1..=count).fold(1.0, |b, n| load * b / (n as f64 + load * b))
    }

    #[test]
    fn erlangs_own_figures_come_out() {
        // One machine and one erlang: half the time it is busy. Ten and ten: 21.46 %, as in every table since 1917.
        assert_eq!(loss_ppm(1_000, 1), Ok(500_000));
        assert_eq!(loss_ppm(10_000, 10), Ok(214_583));
        let for_100 = [10_000, 1_000, 100, 1].map(|ppm| instances_for(100_000, ppm).unwrap());
        assert_eq!(for_100, [117, 128, 137, 149]);
    }

    #[test]
    fn ten_services_share_137_machines_instead_of_240() {
        let p = pool(&vec![Service { offered: vec![10_000], alone: false }; 10], TARGET).unwrap();
        assert_eq!((p.dedicated(), p.shared, p.machines), (240, 137, 137));
        let p = pool(&vec![Service { offered: vec![10_000], alone: false }; 100], TARGET).unwrap();
        assert_eq!((p.dedicated(), p.shared), (2_400, 1_100));
    }

    #[test]
    fn stock_and_sport_share_103_machines_instead_of_200() {
        let behind = |needs: [u64; 2]| needs.map(|n| carries(n, TARGET).unwrap()).into();
        let stock = Service { offered: behind([100, 5]), alone: false };
        let sport = Service { offered: behind([10, 100]), alone: false };
        let p = pool(&[stock.clone(), sport.clone()], TARGET).unwrap();
        assert_eq!((p.own.clone(), p.shared, p.slot), (vec![100, 100], 103, 0));
        // Who may not share brings its own peak.
        let p = pool(&[stock, Service { alone: true, ..sport }], TARGET).unwrap();
        assert_eq!((p.shared, p.machines), (100, 200));
        // The numbers taken as erlangs.
        let erlangs = |offered: [u64; 2]| Service { offered: offered.into(), alone: false };
        let p = pool(&[erlangs([100_000, 5_000]), erlangs([10_000, 100_000])], TARGET).unwrap();
        assert_eq!((p.dedicated(), p.shared), (274, 148));
    }

    #[test]
    fn a_thousand_million_erlangs_are_counted_without_walking_there() {
        let n = instances_for(OFFERED_MAX, TARGET).unwrap();
        assert!(loss_ppm(OFFERED_MAX, n).unwrap() <= TARGET && loss_ppm(OFFERED_MAX, n - 1).unwrap() > TARGET);
        // Machines that are always busy could be fewer by the loss, 100,000; chance takes back some roots of the load.
        assert!((1_000_000_000 - 100_000..1_000_000_000).contains(&n), "{n}");
        assert_eq!(loss_ppm(1_000, u64::MAX), Ok(1));
        assert_eq!(loss_ppm(OFFERED_MAX, 0), Ok(1_000_000));
        assert_eq!(instances_for(OFFERED_MAX, 2_000_000), Ok(0));
        assert_eq!(carries(u64::MAX, 1), Ok(OFFERED_MAX));
    }

    #[test]
    fn the_bits_are_the_same_everywhere() {
        let mut loss = Loss::before(100_000, 137).unwrap();
        while loss.n < 137 {
            loss.step();
        }
        assert_eq!(loss.b.to_bits(), BITS_100_137);
    }
    /// B(137) for 100 erlangs, 0.0000742, as worked out apart from this program.
    const BITS_100_137: u64 = 0x3f13_7514_b616_2752;

    #[test]
    fn what_cannot_be_is_said() {
        let says = |e: NoPool| e.to_string().lines().next().unwrap_or_default().to_owned();
        let of = |offered: &[u64]| Service { offered: offered.into(), alone: false };
        assert_eq!(
            says(pool(&[of(&[1, 2]), of(&[1])], TARGET).unwrap_err()),
            "service 1 has loads for 1 slots, and service 0 for 2"
        );
        assert_eq!(says(pool(&[of(&[])], TARGET).unwrap_err()), "there are 0 slots, and it takes 1 to 10080");
        assert_eq!(
            says(pool(&[of(&[0, OFFERED_MAX]), of(&[5, 1000])], TARGET).unwrap_err()),
            "a load of 1000000001 erlangs in slot 1 is beyond 1000000000"
        );
        assert_eq!(
            says(instances_for(u64::MAX, TARGET).unwrap_err()),
            "a load of 18446744073709551 erlangs is beyond 1000000000"
        );
        assert_eq!(says(instances_for(5, 0).unwrap_err()), "a loss of 0 takes machines without end");
        assert_eq!(pool(&[], TARGET).unwrap().machines, 0);
    }

    /// Loads and targets over all their orders of magnitude.
    fn loads(most: u32) -> impl Strategy<Value = u64> {
        (0..=most, 1_000_u64..10_000).prop_map(|(e, m)| m * 10_u64.pow(e) / 1_000)
    }
    fn targets() -> impl Strategy<Value = u32> {
        (0..=5_u32, 1_u32..10).prop_map(|(e, m)| m * 10_u32.pow(e))
    }

    proptest! {
        #[test]
        fn beginning_near_the_load_changes_nothing(offered in loads(7), ppm in targets()) {
            let n = instances_for(offered, ppm).unwrap();
            prop_assert!(plainly(offered, n) * 1e6 <= f64::from(ppm));
            prop_assert!(n == 0 || plainly(offered, n - 1) * 1e6 > f64::from(ppm));
        }

        #[test]
        fn the_inverse_is_the_inverse(offered in loads(11), count in 0_u64..2_000, ppm in targets()) {
            let n = instances_for(offered, ppm).unwrap();
            prop_assert!(loss_ppm(offered, n).unwrap() <= ppm);
            prop_assert!(n == 0 || loss_ppm(offered, n - 1).unwrap() > ppm);
            let most = carries(count, ppm).unwrap();
            prop_assert!(instances_for(most, ppm).unwrap() <= count && instances_for(most + 1, ppm).unwrap() > count);
        }

        #[test]
        fn more_load_never_takes_fewer_machines_and_sharing_never_more(a in loads(9), b in loads(9), ppm in targets()) {
            let [na, nb, both] = [a, b, a + b].map(|o| instances_for(o, ppm).unwrap());
            prop_assert!(both >= na.max(nb) && both <= na + nb);
        }
    }
}
