//! The example's generator against numbers that PyTorch 2.15 drew on a CPU with AVX-512:
//!
//! ```python
//! torch.manual_seed(1); torch.empty(6, dtype=dtype).uniform_(-0.3, 0.3)
//! torch.manual_seed(1); torch.empty(55, dtype=torch.bfloat16).uniform_(-(37**-0.5), 37**-0.5)[54]
//! torch.manual_seed(0); torch.randn(5); torch.manual_seed(0); torch.randn(20)
//! torch.manual_seed(2); torch.nn.Linear(3, 2, dtype=dtype)
//! ```
#[path = "../examples/helloworld/torch_random.rs"]
mod torch_random;

use torch_random::{Generator, Uniform};
use tutel_moe::Real;
use tutel_moe::half::{bf16, f16};

fn bits<T: Uniform>(values: &[T]) -> Vec<u64> {
    values.iter().map(|value| value.widen().to_f64().to_bits()).collect()
}

fn check_uniform<T: Uniform>(expected: [f64; 6]) {
    let drawn: Vec<T> = Generator::seeded(1).uniform(6, 0.3);
    assert_eq!(bits(&drawn), bits(&expected), "{drawn:?}, not {expected:?}");
}

#[test]
fn uniform_values_have_torchs_bits() {
    check_uniform::<f32>([
        0.154_578_968_882_560_73,
        -0.132_413_476_705_551_15,
        -0.058_158_446_103_334_43,
        0.140_810_683_369_636_54,
        -0.282_431_066_036_224_37,
        0.179_915_189_743_042,
    ]);
    check_uniform::<f64>([
        -0.263_368_035_168_225_8,
        -0.165_267_296_059_409_74,
        -0.159_448_491_633_096_38,
        -0.193_740_463_531_346_7,
        0.033_640_833_689_396_74,
        -0.234_333_687_806_875_36,
    ]);
    check_uniform::<f16>([
        0.154_541_015_625,
        -0.132_446_289_062_5,
        -0.058_166_503_906_25,
        0.140_869_140_625,
        -0.282_470_703_125,
        0.179_931_640_625,
    ]);
    check_uniform::<bf16>([0.154_296_875, -0.132_812_5, -0.058_105_468_75, 0.140_625, -0.283_203_125, 0.179_687_5]);
}

#[test]
fn the_upper_bound_is_left_out_of_half_types() {
    let drawn: Vec<bf16> = Generator::seeded(1).uniform(55, 1.0 / 37f64.sqrt());
    // As an f32 it is 0.16375, whose nearest bf16 is that of the bound.
    assert_eq!(drawn[54], bf16::from_f64(-0.164_062_5));
}

#[test]
fn normal_values_are_within_roundings() {
    let few = [1.540_996_1, -0.293_428_9, -2.178_789_4, 0.568_431_26, -1.084_522_4];
    let many = [
        -1.125_839_8,
        -1.152_360_2,
        -0.250_578_58,
        -0.433_878_8,
        0.598_839_46,
        -1.555_095_1,
        -0.341_360_4,
        1.853_006_1,
        0.468_096_4,
        -0.157_712_44,
        1.443_660_1,
        0.266_049_4,
        1.389_366_2,
        1.586_334_2,
        0.946_298_4,
        -0.843_676_75,
        0.931_826_6,
        1.259_009_2,
        2.004_980_6,
        0.053_736_903,
    ];
    for expected in [&few[..], &many[..]] {
        let drawn = Generator::seeded(0).normal(expected.len());
        for (drawn, expected) in drawn.iter().zip(expected) {
            assert!((drawn - expected).abs() <= 4.0 * f32::EPSILON, "{drawn}, not {expected}");
        }
    }
}

fn check_linear<T: Uniform>(weight: [f64; 6], bias: [f64; 2]) {
    let linear = Generator::seeded(2).linear::<T>(3, 2, true);
    assert_eq!(bits(&linear.weight), bits(&weight), "{:?}", linear.weight);
    assert_eq!(bits(&linear.bias), bits(&bias), "{:?}", linear.bias);
}

#[test]
fn linear_layers_begin_with_torchs_bits() {
    check_linear::<f32>(
        [
            0.132_438_465_952_873_23,
            -0.137_394_517_660_141,
            0.158_325_999_975_204_47,
            -0.029_489_805_921_912_193,
            0.246_636_912_226_676_94,
            0.137_451_365_590_095_52,
        ],
        [-0.066_357_567_906_379_7, -0.466_766_178_607_940_7],
    );
    check_linear::<f64>(
        [
            0.482_157_525_428_118_24,
            -0.465_442_221_240_012_33,
            0.241_045_096_129_318_26,
            0.046_489_975_451_257_75,
            0.477_188_948_401_218,
            0.029_689_760_564_351_73,
        ],
        [-0.438_316_286_615_255_07, -0.269_106_047_403_472_2],
    );
}
