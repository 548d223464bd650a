//! The codebooks and their decision thresholds: the only place where they are written.
//!
//! A codebook is used by rank: `rank` is the number of thresholds strictly below the scaled value, so a tie goes
//! to the lower entry, and `order[rank]` is the code.

const fn bits(words: [u32; 16]) -> [f32; 16] {
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = f32::from_bits(words[i]);
        i += 1;
    }
    values
}

/// Normal float, 4 bits (Dettmers et al. 2023, QLoRA, appendix E), as bitsandbytes stores it.
pub const NF4: [f32; 16] = bits([
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff,
    0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
]);

/// bitsandbytes' FP4 divided by 12: bit 3 is the sign, the low bits are not ordered; code 8 is -0.0.
pub const FP4: [f32; 16] = bits([
    0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000, 0x80000000,
    0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000,
]);

/// Symmetric integers: code c is (c - 7) / 7; code 15 is never written.
pub const INT4: [f32; 16] = {
    let mut values = [0.0; 16];
    let mut code = 0;
    while code < 16 {
        values[code] = (code as f32 - 7.0) / 7.0;
        code += 1;
    }
    values
};

const IDENTITY: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// How a 4-bit codebook is searched.
#[derive(Debug)]
pub struct Ranks {
    /// Ascending fp32 midpoints of the sorted codebook.
    pub thresholds: [f32; 15],
    /// Code of each rank.
    pub order: [u8; 16],
}

const fn ranks(table: &[f32; 16], order: [u8; 16]) -> Ranks {
    let mut thresholds = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        thresholds[i] = (table[order[i] as usize] + table[order[i + 1] as usize]) / 2.0;
        i += 1;
    }
    Ranks { thresholds, order }
}

pub static NF4_RANKS: Ranks = ranks(&NF4, IDENTITY);

/// The midpoint of codes 0 and 8 is zero, so a tiny positive value gets code 8, zero and a tiny negative code 0.
pub static FP4_RANKS: Ranks = ranks(&FP4, FP4_ORDER);

pub static INT4_RANKS: Ranks = {
    let mut ranks = ranks(&INT4, IDENTITY);
    ranks.thresholds[14] = f32::INFINITY;
    ranks
};

impl Ranks {
    /// The code of a value scaled to [-1, 1]; NaN has no threshold below it and gets rank 0.
    #[inline(always)]
    pub fn encode(&self, scaled: f32) -> u8 {
        let rank = self.thresholds.iter().filter(|&&threshold| scaled > threshold).count();
        self.order[rank]
    }
}

const fn little_endian(bytes: &[u8; 1024]) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut i = 0;
    while i < 256 {
        let word = [bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]];
        values[i] = f32::from_le_bytes(word);
        i += 1;
    }
    values
}

/// bitsandbytes' dynamic 8-bit maps. The last bits come from torch.linspace's arithmetic, so they are constants.
pub static DYNAMIC_SIGNED: [f32; 256] = little_endian(include_bytes!("../data/dynmap_signed.f32"));
pub static DYNAMIC_UNSIGNED: [f32; 256] = little_endian(include_bytes!("../data/dynmap_unsigned.f32"));

pub const fn dynamic_map(signed: bool) -> &'static [f32; 256] {
    if signed { &DYNAMIC_SIGNED } else { &DYNAMIC_UNSIGNED }
}

const fn midpoints(map: &[f32; 256]) -> [f32; 255] {
    let mut middle = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        middle[i] = 0.5 * (map[i] + map[i + 1]);
        i += 1;
    }
    middle
}

/// Thresholds of the nearest rule: `x > t[i]` takes entry i + 1. A tie takes the even code, so a threshold between
/// an odd code and the even one above it lies one ulp below the midpoint.
const fn nearest_thresholds(map: &[f32; 256]) -> [f32; 255] {
    let mut thresholds = midpoints(map);
    let mut i = 1;
    while i < 255 {
        thresholds[i] = thresholds[i].next_down();
        i += 2;
    }
    thresholds
}

pub static NEAREST_SIGNED: [f32; 255] = nearest_thresholds(&DYNAMIC_SIGNED);
pub static NEAREST_UNSIGNED: [f32; 255] = nearest_thresholds(&DYNAMIC_UNSIGNED);
static MIDPOINTS_SIGNED: [f32; 255] = midpoints(&DYNAMIC_SIGNED);

/// Number of ascending thresholds strictly below `x`; 0 for NaN.
const fn rank(thresholds: &[f32; 255], x: f32) -> u8 {
    let (mut rank, mut step) = (0, 128);
    while step > 0 {
        if x > thresholds[rank + step - 1] {
            rank += step;
        }
        step /= 2;
    }
    rank as u8
}

/// A table of ranks by the leading bits of a float: at most two thresholds lie inside one bucket.
struct Buckets {
    /// Padded with infinity.
    thresholds: [f32; 256],
    /// Rank at the lower end of each bucket, of positive and of negative values.
    ranks: [[u8; BUCKETS]; 2],
}

/// 2^-23: below the smallest threshold that is not zero.
const MAGNITUDE_MIN: u32 = 0x3400_0000;
const MAGNITUDE_MAX: u32 = 1.0f32.to_bits();
/// Leaves six bits of the mantissa.
const BUCKET_SHIFT: u32 = 17;
const BUCKETS: usize = ((MAGNITUDE_MAX - MAGNITUDE_MIN) >> BUCKET_SHIFT) as usize + 1;

const fn buckets(ascending: &[f32; 255]) -> Buckets {
    let mut thresholds = [f32::INFINITY; 256];
    let mut i = 0;
    while i < 255 {
        thresholds[i] = ascending[i];
        i += 1;
    }
    let mut ranks = [[0; BUCKETS]; 2];
    let mut bucket = 0;
    while bucket < BUCKETS {
        let low = if bucket == 0 { 0 } else { MAGNITUDE_MIN + ((bucket as u32) << BUCKET_SHIFT) };
        let high = MAGNITUDE_MIN + ((bucket as u32 + 1) << BUCKET_SHIFT);
        ranks[0][bucket] = rank(ascending, f32::from_bits(low));
        ranks[1][bucket] = rank(ascending, -f32::from_bits(high));
        bucket += 1;
    }
    Buckets { thresholds, ranks }
}

static BUCKETS_SIGNED: Buckets = buckets(&NEAREST_SIGNED);
static BUCKETS_UNSIGNED: Buckets = buckets(&NEAREST_UNSIGNED);

impl Buckets {
    #[inline(always)]
    fn rank(&self, x: f32) -> u8 {
        let bits = x.to_bits();
        let magnitude = (bits & 0x7fff_ffff).clamp(MAGNITUDE_MIN, MAGNITUDE_MAX);
        let bucket = ((magnitude - MAGNITUDE_MIN) >> BUCKET_SHIFT) as usize;
        let mut rank = self.ranks[(bits >> 31) as usize][bucket];
        rank += u8::from(x > self.thresholds[usize::from(rank)]);
        rank += u8::from(x > self.thresholds[usize::from(rank)]);
        if x.is_nan() { 0 } else { rank }
    }
}

/// The nearest rule (optimizer state): the entry nearest to `x` by fp32 midpoints, a tie takes the even code.
#[inline(always)]
pub fn encode_nearest(signed: bool, x: f32) -> u8 {
    if signed { BUCKETS_SIGNED.rank(x) } else { BUCKETS_UNSIGNED.rank(x) }
}

/// The nearest rule of first moments: a negative value never takes code 127, which is zero, so that codes keep the sign.
#[inline(always)]
pub fn encode_first_moment(x: f32) -> u8 {
    let code = encode_nearest(true, x);
    if x < 0.0 && DYNAMIC_SIGNED[usize::from(code)] == 0.0 { code - 1 } else { code }
}

/// The grid rule (nested absmax, signed map): `x` is snapped to 65,536 steps over [-1, 1], then the nearest entry
/// is taken, ties down. Its bytes equal those of bitsandbytes' CPU library.
#[inline(always)]
pub fn encode_grid(x: f32) -> u8 {
    let step = ((x.clamp(-1.0, 1.0) + 1.0) * 0.5 * 65535.0 + 0.5) as u16;
    rank(&MIDPOINTS_SIGNED, -1.0 + (2.0 * step as f32) / 65535.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nf4_thresholds_are_the_published_bits() {
        let expected = [
            0xbf591cd8,
            0xbf1c5270,
            0xbeeb8480,
            0xbeadea76,
            0xbe703cec,
            0xbe0d38bc,
            0xbd3a7871,
            0x3d22faff,
            0x3df64862,
            0x3e5067e0,
            0x3e9582d4,
            0x3ec753f9,
            0x3f006d04,
            0x3f248daf,
            0x3f5c89da_u32,
        ];
        assert_eq!(NF4_RANKS.thresholds.map(f32::to_bits), expected);
    }

    #[test]
    fn fp4_thresholds_are_the_published_bits() {
        let positive = [0x3b2aaaab, 0x3db00000, 0x3e555556, 0x3e955556, 0x3ed55556, 0x3f155556, 0x3f555556_u32];
        for (i, bits) in positive.into_iter().enumerate() {
            assert_eq!(FP4_RANKS.thresholds[8 + i].to_bits(), bits);
            assert_eq!(FP4_RANKS.thresholds[6 - i], -f32::from_bits(bits));
        }
        assert_eq!(FP4_RANKS.thresholds[7], 0.0);
    }

    #[test]
    fn a_tie_goes_down_and_the_next_float_up() {
        for ranks in [&NF4_RANKS, &FP4_RANKS] {
            for (i, &threshold) in ranks.thresholds.iter().enumerate() {
                assert_eq!(ranks.encode(threshold), ranks.order[i]);
                assert_eq!(ranks.encode(threshold.next_up()), ranks.order[i + 1]);
            }
        }
    }

    #[test]
    fn every_entry_encodes_to_itself() {
        for code in 0..15u8 {
            assert_eq!(NF4_RANKS.encode(NF4[code as usize]), code);
            assert_eq!(INT4_RANKS.encode(INT4[code as usize]), code);
        }
        for code in (0..16u8).filter(|&code| code != 8) {
            assert_eq!(FP4_RANKS.encode(FP4[code as usize]), code);
        }
        assert_eq!(INT4_RANKS.encode(2.0), 14);
    }

    #[test]
    fn dynamic_maps_are_sorted_and_symmetric_at_their_centre() {
        for map in [&DYNAMIC_SIGNED, &DYNAMIC_UNSIGNED] {
            assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!(map[255], 1.0);
        }
        assert_eq!(DYNAMIC_SIGNED[127], 0.0);
        assert_eq!(DYNAMIC_SIGNED[126], -DYNAMIC_SIGNED[128]);
        assert_eq!(DYNAMIC_UNSIGNED[0], 0.0);
    }

    /// The search of bitsandbytes' CUDA kernels: pivot 127, steps 64..1, then the nearer of two.
    fn pivot_search(map: &[f32; 256], x: f32) -> u8 {
        let (mut pivot, mut low, mut high) = (127usize, 0usize, 255usize);
        for step in [64, 32, 16, 8, 4, 2, 1] {
            if x > map[pivot] {
                low = pivot;
                pivot += step;
            } else {
                high = pivot;
                pivot -= step;
            }
        }
        let middle = 0.5 * (map[pivot] + map[if x > map[pivot] { high } else { low }]);
        let nearest = match x > map[pivot] {
            true if x > middle => high,
            false if x < middle => low,
            _ => pivot,
        };
        nearest as u8
    }

    #[test]
    fn nearest_rule_equals_the_pivot_search_at_every_threshold() {
        for signed in [true, false] {
            let map = dynamic_map(signed);
            let at_midpoints = midpoints(map).into_iter().flat_map(|t| [t.next_down(), t, t.next_up()]);
            for x in at_midpoints.chain(*map).chain([-1.0, -0.0, 0.0, 1.0, f32::NAN]) {
                assert_eq!(encode_nearest(signed, x), pivot_search(map, x), "{x:e}");
            }
        }
    }

    #[test]
    fn the_buckets_of_the_nearest_rule_equal_the_search() {
        for (signed, thresholds) in [(true, &NEAREST_SIGNED), (false, &NEAREST_UNSIGNED)] {
            let leading_bits = (0..=u32::MAX >> 12).map(|bits| f32::from_bits(bits << 12));
            let special = [f32::from_bits(1), -f32::from_bits(1), 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY];
            for x in leading_bits.chain(special) {
                assert_eq!(encode_nearest(signed, x), rank(thresholds, x), "{x:e}");
            }
        }
    }

    #[test]
    fn grid_rule_moves_zero_to_131() {
        assert_eq!(encode_grid(0.0), 131);
        assert_eq!(encode_grid(1.0), 255);
        assert_eq!(encode_grid(-1.0), 0);
    }
}
