//! Chance that is the same every time: a small seeded generator.
//!
//! ```text
//! (seed, name) ─▶ Chance ─▶ numbers      one child stream per name, so that a line added to a
//!                                        scenario leaves every other line's numbers alone
//! ```

/// A splitmix64 generator: one word of state, every seed as good as another.
#[derive(Debug, Clone)]
pub struct Chance {
    state: u64,
}

impl Chance {
    /// The stream called `name` of a scenario's `seed`.
    pub fn named(seed: u64, name: &[&str]) -> Chance {
        // FNV-1a, with a zero byte after each part so that ("a", "bc") and ("ab", "c") differ.
        let bytes = name.iter().flat_map(|part| part.bytes().chain(std::iter::once(0)));
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut chance = Chance { state: seed ^ hash };
        // Nearby seeds differ in few bits; the first output spreads them before anything is drawn.
        chance.state = chance.number();
        chance
    }

    /// The next 64 bits.
    pub fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number above 0 and at most 1.
    pub fn fraction(&mut self) -> f64 {
        ((self.number() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// A number from 0 to `below` - 1; 0 if `below` is 0.
    pub fn under(&mut self, below: u64) -> u64 {
        ((u128::from(self.number()) * u128::from(below)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_its_own_stream() {
        let first = |seed, name: &[&str]| Chance::named(seed, name).number();
        assert_eq!(first(1, &["maps", "seoul"]), first(1, &["maps", "seoul"]));
        assert_ne!(first(1, &["maps", "seoul"]), first(1, &["maps", "berlin"]));
        assert_ne!(first(1, &["ab", "c"]), first(1, &["a", "bc"]));
        assert_ne!(first(1, &["maps"]), first(2, &["maps"]));
    }

    #[test]
    fn fractions_are_spread_evenly() {
        let mut chance = Chance::named(7, &["spread"]);
        let mean = (0..10_000).map(|_| chance.fraction()).sum::<f64>() / 10_000.0;
        assert!((0.49..0.51).contains(&mean), "{mean}");
        assert!((0..1000).all(|_| chance.under(6) < 6));
    }
}
