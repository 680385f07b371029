//! That each level of processor features computes with what it is named after: its bits tell.
mod common;

use common::{on_levels, written};
use half::bf16;
use tutel_core::GroupedShape;
use tutel_cpu::{GroupedGemm, Level, Scalar, Serial};

/// What the processor has, asked apart from the library, so that a mistake in its own question shows.
#[cfg(target_arch = "x86_64")]
fn expected() -> Vec<Level> {
    let (fma, avx2) = (is_x86_feature_detected!("fma"), is_x86_feature_detected!("avx2"));
    let levels = [
        (Level::Portable, true),
        (Level::Avx2, avx2 && fma),
        (Level::Avx512, avx2 && fma && is_x86_feature_detected!("avx512bw")),
        (Level::Avx512Bf16, avx2 && fma && is_x86_feature_detected!("avx512bf16")),
    ];
    levels.into_iter().filter_map(|(level, there)| there.then_some(level)).collect()
}

#[cfg(target_arch = "aarch64")]
fn expected() -> Vec<Level> {
    vec![Level::Portable, Level::Neon]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn expected() -> Vec<Level> {
    vec![Level::Portable]
}

/// `row column`, in a product of as many equal columns as any kernel takes at once.
fn inner_product<T: Scalar>(row: &[T], column: &[T]) -> T {
    const COLUMNS: usize = 64;
    let weight: Vec<T> = column.iter().flat_map(|&value| [value; COLUMNS]).collect();
    let shape = GroupedShape::new(1, 1, row.len(), COLUMNS).unwrap();
    let input = GroupedGemm {
        rows: row.into(),
        weight: &weight,
        second: None,
        bias: None,
        offsets: &[0, 1],
        transposed: false,
    };
    let products = written(COLUMNS, |output| tutel_cpu::grouped_gemm(input, shape, output, &Serial).unwrap());
    assert!(products.iter().all(|product| *product == products[0]), "{products:?}");
    products[0]
}

#[test]
fn the_levels_are_those_of_the_processor() {
    assert_eq!(Level::available().collect::<Vec<_>>(), expected());
}

#[test]
fn levels_of_other_architectures_cap_nothing() {
    on_levels(|_| {
        let foreign = if cfg!(target_arch = "x86_64") { Level::Neon } else { Level::Avx2 };
        foreign.set_cap();
        assert_eq!(Some(Level::current()), Level::available().last());
    });
}

#[test]
fn every_level_but_the_portable_one_multiplies_and_adds_with_one_rounding() {
    // (1 + e)^2 - (1 + 2 e) is e^2, which is lost where the square is rounded first.
    on_levels(|level| {
        let fused = level != Level::Portable;
        let e = 2f32.powi(-12);
        let expected = if fused { e * e } else { 0.0 };
        let product = inner_product(&[-1.0, 1.0 + e], &[1.0 + 2.0 * e, 1.0 + e]);
        assert_eq!(product.to_bits(), expected.to_bits(), "f32, {}: {product:e}", level.name());
        let e = 2f64.powi(-27);
        let expected = if fused { e * e } else { 0.0 };
        let product = inner_product(&[-1.0, 1.0 + e], &[1.0 + 2.0 * e, 1.0 + e]);
        assert_eq!(product.to_bits(), expected.to_bits(), "f64, {}: {product:e}", level.name());
    });
}

#[test]
fn bf16_is_multiplied_by_the_instruction_for_it() {
    // That instruction alone takes numbers below the smallest normal one as zero.
    let (least, large) = (bf16::from_bits(1), bf16::from_f32(2f32.powi(100)));
    on_levels(|level| {
        let expected = if level == Level::Avx512Bf16 { bf16::ZERO } else { bf16::from_f32(2f32.powi(-33)) };
        assert_eq!(inner_product(&[least], &[large]), expected, "{}", level.name());
    });
}
