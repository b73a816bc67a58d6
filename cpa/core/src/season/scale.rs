//! Logarithms to base 2 in whole numbers: a library's need not be the same on the next machine.
//!
//! ```text
//!  lg:   the highest bit, then one bit more by each squaring
//!  pow2: a product of the roots 2^(1/2), 2^(1/4), … that the bits name
//! ```

/// A logarithm to base 2, in parts of [`ONE`].
pub type Lg = i64;
/// 1 as a logarithm: 16 bits behind the point, a factor of 1.00001.
pub const ONE: Lg = 1 << BITS;
const BITS: u32 = 16;

/// 2^(1/2), 2^(1/4), … in 2^-30.
const ROOTS: [u64; BITS as usize] = {
    let mut roots = [0; BITS as usize];
    let (mut i, mut root) = (0, 2_u64 << 30);
    while i < roots.len() {
        root = (root << 30).isqrt();
        roots[i] = root;
        i += 1;
    }
    roots
};

/// The logarithm of `x`; of 0 as of 1.
pub fn lg(x: u64) -> Lg {
    let x = x.max(1);
    let whole = 63 - x.leading_zeros();
    // From 1 to 2, in 2^-31.
    let mut rest = (x << (63 - whole)) >> 32;
    let mut bits = 0;
    for _ in 0..BITS {
        rest = (rest * rest) >> 31;
        bits <<= 1;
        if rest >> 32 > 0 {
            rest >>= 1;
            bits |= 1;
        }
    }
    (Lg::from(whole) << BITS) | bits
}

/// 2^`l`, in 2^-`point` (at most 32), rounded down; as much as fits.
pub fn pow2(l: Lg, point: u32) -> u64 {
    let (whole, bits) = (l >> BITS, l & (ONE - 1));
    let mut product = 1_u64 << 30;
    for (i, root) in ROOTS.iter().enumerate() {
        if bits >> (BITS as usize - 1 - i) & 1 == 1 {
            product = (product * root) >> 30;
        }
    }
    let shift = whole.saturating_add(Lg::from(point)) - 30;
    match shift {
        33.. => u64::MAX,
        0..=32 => product << shift,
        -63..0 => product >> -shift,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn powers_of_two_are_exact() {
        for n in 0..50 {
            assert_eq!(lg(1 << n), n * ONE);
            assert_eq!(pow2(n * ONE, 8), 1 << (n + 8));
        }
        assert_eq!((lg(0), pow2(-ONE, 32), pow2(Lg::MIN / 2, 32), pow2(100 * ONE, 8)), (0, 1 << 31, 0, u64::MAX));
    }

    proptest! {
        #[test]
        fn there_and_back_is_within_a_ten_thousandth(x in 256_u64..1 << 50) {
            let back = pow2(lg(x), 0);
            prop_assert!(back.abs_diff(x) <= x / 10_000 + 1, "{x} {back}");
        }

        #[test]
        fn more_is_never_less(x in 1_u64..u64::MAX, y in 1_u64..u64::MAX) {
            prop_assert!((x <= y) == (lg(x) <= lg(y)) || lg(x) == lg(y));
        }
    }
}
