#![allow(clippy::unwrap_used)]

mod common;

use common::{Bits, QUANT_TYPES, assert_siblings_equal, backends, bits, dequantize, normal, plain, quantize};
use half::{bf16, f16};
use halfbyte_core::{Absmax, CpuBackend, QuantType, TensorRef};

fn assert_bits_equal<T: Bits>(packed: &[u8], absmax: Absmax<'_>, quant_type: QuantType, blocksize: usize, n: usize) {
    assert_siblings_equal(&format!("{quant_type} blocksize={blocksize} n={n}"), |backend| {
        bits(&dequantize::<T>(backend, packed, absmax, quant_type, blocksize, n))
    });
}

#[test]
fn simd_gives_the_bits_of_the_plain_loop() {
    for quant_type in QUANT_TYPES {
        for blocksize in [32, 64, 256, 4096] {
            for n in [1usize, 31, 64, 95, 96, 4097, 70_001] {
                let packed: Vec<u8> = (0..n.div_ceil(2)).map(|i| (i * 37 % 251) as u8).collect();
                let absmax = normal(n.div_ceil(blocksize), 5);
                assert_bits_equal::<f32>(&packed, plain(&absmax), quant_type, blocksize, n);
                assert_bits_equal::<f16>(&packed, plain(&absmax), quant_type, blocksize, n);
                assert_bits_equal::<bf16>(&packed, plain(&absmax), quant_type, blocksize, n);
            }
        }
    }
}

#[test]
fn overflow_and_subnormals_round_alike() {
    let packed: Vec<u8> = (0..32).map(|i| (i * 8 + i) as u8).collect();
    for scale in [1e38, 3.4e38, 70_000.0, 1e-6, 3e-8, 1e-39, f32::INFINITY, f32::NAN] {
        for quant_type in QUANT_TYPES {
            assert_bits_equal::<f16>(&packed, plain(&[scale]), quant_type, 64, 64);
            assert_bits_equal::<bf16>(&packed, plain(&[scale]), quant_type, 64, 64);
        }
    }
}

#[test]
fn a_value_is_the_table_entry_times_the_scale() {
    for backend in backends() {
        let packed: Vec<u8> = (0..16).map(|code| code << 4 | (15 - code)).collect();
        for quant_type in QUANT_TYPES {
            let values: Vec<f32> = dequantize(&backend, &packed, plain(&[0.7]), quant_type, 32, 32);
            for code in 0..16 {
                assert_eq!(values[2 * code].to_bits(), (quant_type.table()[code] * 0.7).to_bits());
                assert_eq!(values[2 * code + 1].to_bits(), (quant_type.table()[15 - code] * 0.7).to_bits());
            }
        }
        let negative_zero: Vec<f32> = dequantize(&backend, &[0x88], plain(&[1.0]), QuantType::Fp4, 32, 2);
        assert_eq!(bits(&negative_zero), [0x8000_0000; 2]);
    }
}

#[test]
fn a_nested_scale_is_multiplied_then_added() {
    let n = 300 * 32;
    let codes: Vec<u8> = (0..300).map(|i| (i % 256) as u8).collect();
    let (absmax, offset) = ([0.123_456_79f32, 7.654_321], 0.987_654_3f32);
    let map = normal(256, 9);
    let packed = vec![0xF0; n / 2];
    let nested = Absmax::Nested {
        codes: TensorRef::from_slice(&codes),
        absmax: TensorRef::from_slice(&absmax),
        map: TensorRef::from_slice(&map),
        offset,
    };
    for backend in backends() {
        let values: Vec<f32> = dequantize(&backend, &packed, nested, QuantType::Nf4, 32, n);
        for block in 0..300 {
            let product = std::hint::black_box(map[codes[block] as usize] * absmax[block / 256]);
            assert_eq!(values[block * 32], product + offset);
        }
    }
}

#[test]
fn requantizing_dequantized_weights_changes_nothing() {
    let x = normal(10_000, 2);
    for quant_type in QUANT_TYPES {
        let (packed, absmax) = quantize(&CpuBackend::new(), &x, quant_type, 64);
        let values: Vec<f32> = dequantize(&CpuBackend::new(), &packed, plain(&absmax), quant_type, 64, x.len());
        let again = quantize(&CpuBackend::new(), &values, quant_type, 64);
        let same = packed.iter().zip(&again.0).filter(|(a, b)| a == b).count();
        // FP4 has two codes for zero, and the second one reads back as zero.
        assert!(same == packed.len() || quant_type == QuantType::Fp4);
        assert_eq!(absmax, again.1);
    }
}
