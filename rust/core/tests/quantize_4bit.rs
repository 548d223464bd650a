#![allow(clippy::unwrap_used)]

mod common;

use common::{QUANT_TYPES, assert_siblings_equal, backends, bits, cast, normal, quantize};
use half::{bf16, f16};
use halfbyte_core::ops::quantize_4bit::Quantize4bit;
use halfbyte_core::tensor::Float;
use halfbyte_core::{CpuBackend, Device, Error, QuantType, TensorMut, TensorRef, parallel};

const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

#[test]
fn the_even_element_is_the_high_nibble() {
    let x: Vec<f32> = (0..64).map(|i| i as f32 / 63.0).collect();
    let expected = [
        119, 120, 136, 136, 153, 153, 153, 153, 170, 170, 170, 187, 187, 187, 188, 204, 204, 204, 205, 221, 221, 221,
        221, 238, 238, 238, 238, 238, 239, 255, 255, 255,
    ];
    for backend in backends() {
        let (packed, absmax) = quantize(&backend, &x, QuantType::Nf4, 64);
        assert_eq!((packed[..4].to_vec(), packed[30..].to_vec()), (expected[..4].to_vec(), expected[30..].to_vec()));
        assert_eq!(absmax, [1.0]);
    }
}

/// The input of the golden cases: fp32 throughout, so that i * 7919 rounds.
fn golden_input() -> Vec<f32> {
    (0..3300).map(|i| (((i as f32) * 7919.0) % 1009.0 - 504.0) / 300.0).collect()
}

#[test]
fn the_first_golden_bytes() {
    for backend in backends() {
        let (nf4, _) = quantize(&backend, &golden_input(), QuantType::Nf4, 64);
        assert_eq!(nf4[..8], [14, 200, 82, 31, 218, 116, 16, 236]);
        let (fp4, _) = quantize(&backend, &golden_input(), QuantType::Fp4, 64);
        assert_eq!(fp4[..8], [178, 70, 253, 163, 87, 156, 171, 37]);
    }
}

#[test]
fn zero_blocks_and_odd_padding_take_the_code_of_zero() {
    for backend in backends() {
        for (quant_type, code) in [(QuantType::Nf4, 7), (QuantType::Fp4, 0), (QuantType::Int4, 7)] {
            let (packed, absmax) = quantize(&backend, &[0.0f32; 65], quant_type, 64);
            assert_eq!((packed, absmax), (vec![code << 4 | code; 33], vec![0.0; 2]));
            let (packed, _) = quantize(&backend, &[1.0f32; 65], quant_type, 64);
            assert_eq!(packed[32] & 15, code);
        }
        assert_eq!(quantize(&backend, &[1.0f32; 65], QuantType::Nf4, 64).0[32], 0xF7);
    }
}

/// Values on and beside every threshold, with an absmax that is no power of two.
fn near_thresholds(quant_type: QuantType) -> Vec<f32> {
    let scale = 1.7f32;
    let finite = quant_type.ranks().thresholds.into_iter().filter(|t| t.is_finite());
    let near: Vec<f32> = finite.flat_map(|t| [t.next_down(), t, t.next_up()]).map(|t| t * scale).collect();
    [scale].into_iter().chain(near.into_iter().cycle().take(4095)).collect()
}

fn assert_bytes_equal<T: Float>(x: &[f32], quant_type: QuantType, blocksize: usize) {
    let x: Vec<T> = cast(x);
    let context = format!("{quant_type} blocksize={blocksize} n={}", x.len());
    assert_siblings_equal(&context, |backend| {
        let (packed, absmax) = quantize(backend, &x, quant_type, blocksize);
        (packed, bits(&absmax))
    });
}

#[test]
fn simd_gives_the_bytes_of_the_plain_loop() {
    for quant_type in QUANT_TYPES {
        for blocksize in BLOCKSIZES {
            for n in [1, 2, 31, 63, 64, 65, 4097, 3 * blocksize - 1] {
                let mut x = normal(n, n as u64);
                x.iter_mut().step_by(7).for_each(|x| *x = 0.0);
                assert_bytes_equal::<f32>(&x, quant_type, blocksize);
                assert_bytes_equal::<f16>(&x, quant_type, blocksize);
                assert_bytes_equal::<bf16>(&x, quant_type, blocksize);
            }
            assert_bytes_equal::<f32>(&near_thresholds(quant_type), quant_type, blocksize);
        }
    }
}

#[test]
fn extreme_magnitudes_are_equal_too() {
    for factor in [1e-45, 1e-39, 1.2e-38, 1e-30, 1e38] {
        let x: Vec<f32> = normal(4096, 3).into_iter().map(|x| (x * 0.3) * factor).collect();
        for quant_type in QUANT_TYPES {
            assert_bytes_equal::<f32>(&x, quant_type, 64);
        }
    }
}

#[test]
fn a_value_that_is_not_finite_shows_in_its_block_only() {
    for backend in backends() {
        for (value, expected) in [(f32::NAN, f32::NAN), (f32::INFINITY, f32::INFINITY), (-f32::NAN, f32::NAN)] {
            let mut x = vec![0.5f32; 200];
            x[70] = value;
            x[71] = if value.is_nan() { f32::INFINITY } else { 2.0 };
            let (_, absmax) = quantize(&backend, &x, QuantType::Nf4, 64);
            assert_eq!((absmax[0], absmax[2], absmax[3]), (0.5, 0.5, 0.5));
            assert!(absmax[1] == expected || (absmax[1].is_nan() && expected.is_nan()));
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let x = normal(300_003, 1);
    let results = [1, 2, 3].map(|threads| {
        parallel::set_num_threads(threads);
        quantize(&CpuBackend::new(), &x, QuantType::Nf4, 64)
    });
    parallel::set_num_threads(0);
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn nothing_is_quantized_to_nothing() {
    assert_eq!(quantize(&CpuBackend::new(), &[0f32; 0], QuantType::Nf4, 64), (vec![], vec![]));
}

#[test]
fn wrong_arguments_are_named() {
    let (x, mut packed, mut absmax) = ([0f32; 100], [0u8; 50], [0f32; 2]);
    let mut check = |blocksize: usize, packed_len: usize| {
        let args = Quantize4bit::new(
            TensorRef::from_slice(&x),
            TensorMut::from_slice(&mut packed[..packed_len]),
            TensorMut::from_slice(&mut absmax),
            QuantType::Nf4,
            blocksize,
        );
        args.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(check(64, 50), Ok(()));
    let message = "quantize_4bit: packed must have 50 elements (two codes a byte), got 49";
    assert_eq!(check(64, 49), Err(message.to_string()));
    let message = "quantize_4bit: absmax must have 4 elements (one a block), got 2";
    assert_eq!(check(32, 50), Err(message.to_string()));
    let message = "quantize_4bit: blocksize must be a power of two in 32..=4096, got 96";
    assert_eq!(check(96, 50), Err(message.to_string()));
}

#[test]
fn wrong_dtypes_devices_and_addresses_are_named() {
    let (mut packed, mut absmax) = ([0u8; 50], [0f32; 2]);
    let mut check = |x: TensorRef<'_>| {
        let (packed, absmax) = (TensorMut::from_slice(&mut packed), TensorMut::from_slice(&mut absmax));
        Quantize4bit::new(x, packed, absmax, QuantType::Nf4, 64).map(|_| ()).unwrap_err()
    };
    let message = "quantize_4bit: x must have dtype float32, float16 or bfloat16, got uint8";
    assert_eq!(check(TensorRef::from_slice(&[0u8; 100])).to_string(), message);
    let values = [0f32; 101];
    // SAFETY: the pointer is never read, the checks fail before.
    let on_gpu = unsafe { TensorRef::new(values.as_ptr().cast(), 100, halfbyte_core::DType::F32, Device::Cuda(1)) };
    assert_eq!(check(on_gpu).to_string(), "quantize_4bit: packed must be on cuda:1 like x, got cpu");
    // SAFETY: as above.
    let shifted = unsafe {
        let bytes: *const u8 = values.as_ptr().cast();
        TensorRef::new(bytes.add(1).cast(), 100, halfbyte_core::DType::F32, Device::Cpu)
    };
    assert!(matches!(check(shifted), Error::Alignment { name: "x", expected: 4, .. }));
}

#[test]
fn an_unknown_quant_type_lists_the_known_ones() {
    let message = "linear: quant_type must be 'nf4', 'fp4' or 'int4', got 'nf3'";
    assert_eq!(QuantType::parse("linear", "nf3").unwrap_err().to_string(), message);
}
