//! Grouped products against their naive twin on every level of processor features that this machine has. One test, since
//! the cap on levels holds for the whole process.
mod common;

use common::{check_grouped, every_type};
use tutel_core::GroupedShape;
use tutel_cpu::Level;

#[test]
fn every_level_computes_the_same_products() {
    let highest = Level::current();
    for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16] {
        if level > highest {
            println!("{} is not tried: this processor ends at {}", level.name(), highest.name());
            continue;
        }
        level.set_cap();
        assert_eq!(Level::current(), level);
        for transposed in [false, true] {
            // More rows, columns and depth than a block; odd everything; an inner size of 1; few rows.
            let shapes = [(3, 530, 70, 65), (2, 31, 1057, 300), (2, 40, 1, 33), (1, 3, 600, 7), (2, 64, 512, 256)];
            for (experts, rows, inner, outer) in shapes {
                let shape = GroupedShape::new(experts, rows, inner, outer).unwrap();
                let offsets: Vec<i64> = (0..=experts).map(|e| (e * (rows - 1) / experts) as i64).collect();
                every_type!(check_grouped(&offsets, shape, transposed, true, 7));
            }
        }
    }
}
