//! What the processor can do.
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// Features that kernels are compiled for, each level with those of the levels before on the same architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing beyond the target's baseline.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 with `AVX512_BF16`.
    Avx512Bf16,
    /// Arm, 64 bits: all of these have NEON.
    Neon,
}

const LEVELS: [(Level, &str); 5] = [
    (Level::Portable, "portable"),
    (Level::Avx2, "avx2"),
    (Level::Avx512, "avx512"),
    (Level::Avx512Bf16, "avx512_bf16"),
    (Level::Neon, "neon"),
];

/// Those of this architecture, in ascending order.
#[cfg(target_arch = "x86_64")]
const OURS: &[Level] = &[Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16];
#[cfg(target_arch = "aarch64")]
const OURS: &[Level] = &[Level::Portable, Level::Neon];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OURS: &[Level] = &[Level::Portable];

const NO_CAP: u8 = u8::MAX;
static CAP: AtomicU8 = AtomicU8::new(NO_CAP);

impl Level {
    /// The level of this processor, or the cap if that is lower.
    pub fn current() -> Self {
        let cap = CAP.load(Ordering::Relaxed);
        let detected = Self::detected();
        OURS.iter().copied().find(|level| *level as u8 == cap).map_or(detected, |cap| detected.min(cap))
    }

    /// The levels that this processor has, in ascending order; a cap does not hide any.
    pub fn available() -> impl Iterator<Item = Self> {
        OURS.iter().copied().filter(|level| *level <= Self::detected())
    }

    /// Uses no more than this level's features from now on; a cap above the processor's level, or of another
    /// architecture, limits nothing.
    pub fn set_cap(self) {
        CAP.store(if OURS.contains(&self) { self as u8 } else { NO_CAP }, Ordering::Relaxed);
    }

    /// The name, as in the error of [`Level::from_str`].
    pub fn name(self) -> &'static str {
        LEVELS[self as usize].1
    }

    fn detected() -> Self {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(Self::detect)
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (avx2, avx2 && avx512) {
            (_, true) if is_x86_feature_detected!("avx512bf16") => Self::Avx512Bf16,
            (_, true) => Self::Avx512,
            (true, _) => Self::Avx2,
            _ => Self::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        // What there is on other architectures belongs to their baseline.
        OURS[OURS.len() - 1]
    }
}

/// A level's name that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownLevel(String);

impl std::fmt::Display for UnknownLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = LEVELS.map(|(_, name)| name).join(", ");
        write!(f, "unknown level {:?} of processor features; known are {names}", self.0)
    }
}

impl std::error::Error for UnknownLevel {}

impl FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(name: &str) -> Result<Self, UnknownLevel> {
        LEVELS.iter().find(|(_, known)| *known == name).map(|(level, _)| *level).ok_or(UnknownLevel(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for (level, name) in LEVELS {
            assert_eq!(name.parse(), Ok(level));
            assert_eq!(level.name(), name);
        }
        let error = "sse".parse::<Level>().unwrap_err().to_string();
        assert!(error.contains("\"sse\"") && error.contains("avx512_bf16"), "{error}");
    }
}
