#![allow(clippy::unwrap_used)]

mod common;

use common::normal;
use halfbyte_core::codebook::{dynamic_map, encode_grid};
use halfbyte_core::ops::dequantize_blockwise::DequantizeBlockwise;
use halfbyte_core::ops::double_quantize::DoubleQuantize;
use halfbyte_core::ops::quantize_blockwise::QuantizeBlockwise;
use halfbyte_core::{Backend, CpuBackend, TensorMut, TensorRef};

fn quantize(x: &[f32], signed: bool, blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut absmax) = (vec![0; x.len()], vec![0.0; x.len().div_ceil(blocksize)]);
    let (to, scales) = (TensorMut::from_slice(&mut codes), TensorMut::from_slice(&mut absmax));
    let args = QuantizeBlockwise::new(TensorRef::from_slice(x), to, scales, signed, blocksize).unwrap();
    CpuBackend::new().quantize_blockwise(args).unwrap();
    (codes, absmax)
}

/// sin(0.37 i) exp(-i / 300): the published figures of the nearest rule.
fn wave() -> Vec<f32> {
    (0..1000).map(|i| ((0.37 * i as f64).sin() * (-(i as f64) / 300.0).exp()) as f32).collect()
}

#[test]
fn the_published_codes_of_both_maps() {
    let (codes, absmax) = quantize(&wave(), true, 256);
    assert_eq!(codes[..12], [127, 209, 232, 248, 255, 252, 240, 220, 196, 57, 34, 15]);
    for (value, expected) in absmax.into_iter().zip([0.982_690_6, 0.421_726_35, 0.179_100_93, 0.076_388_31f32]) {
        assert!((value - expected).abs() < 3e-7);
    }
    let positive: Vec<f32> = wave().into_iter().map(f32::abs).collect();
    let (codes, _) = quantize(&positive, false, 256);
    assert_eq!(codes[..12], [0, 164, 209, 241, 255, 249, 225, 186, 138, 139, 186, 224]);
}

#[test]
fn no_entry_of_the_map_is_nearer_than_the_chosen_one() {
    let x = normal(5000, 1);
    for blocksize in [64, 256, 4096] {
        let (codes, absmax) = quantize(&x, true, blocksize);
        for (i, (&x, &code)) in x.iter().zip(&codes).enumerate() {
            let scaled = f64::from(x) / f64::from(absmax[i / blocksize]);
            let distance = |entry: f32| (scaled - f64::from(entry)).abs();
            let nearest = dynamic_map(true).iter().map(|&entry| distance(entry)).fold(f64::INFINITY, f64::min);
            assert!(distance(dynamic_map(true)[usize::from(code)]) <= nearest + 1e-7);
        }
    }
}

#[test]
fn codes_decode_to_entry_times_absmax() {
    let codes: Vec<u8> = (0..=255).chain(0..=100).collect();
    let absmax = [0.5f32, 3.0, 1.5, 9.0, 2.0, 0.25];
    for signed in [true, false] {
        let mut out = vec![0f32; codes.len()];
        let (from, scales) = (TensorRef::from_slice(&codes), TensorRef::from_slice(&absmax));
        let args = DequantizeBlockwise::new(from, scales, signed, 64, TensorMut::from_slice(&mut out)).unwrap();
        CpuBackend::new().dequantize_blockwise(args).unwrap();
        for (i, &value) in out.iter().enumerate() {
            assert_eq!(value, dynamic_map(signed)[usize::from(codes[i])] * absmax[i / 64]);
        }
    }
}

#[test]
fn a_zero_block_keeps_its_zeros() {
    assert_eq!(quantize(&[0.0; 70], true, 64), (vec![127; 70], vec![0.0; 2]));
    assert_eq!(quantize(&[0.0; 70], false, 64), (vec![0; 70], vec![0.0; 2]));
}

fn double_quantize(absmax: &[f32]) -> (Vec<u8>, Vec<f32>, f32) {
    let groups = absmax.len().div_ceil(256);
    let (mut codes, mut nested, mut offset) = (vec![0; absmax.len()], vec![0.0; groups], [f32::NAN]);
    let mut lanes = vec![0u64; 256 * absmax.len().div_ceil(65536)];
    // SAFETY: any eight bytes are a u64 and the other way round.
    let bytes = unsafe { lanes.align_to_mut::<u8>().1 };
    let args = DoubleQuantize::new(
        TensorRef::from_slice(absmax),
        TensorMut::from_slice(&mut codes),
        TensorMut::from_slice(&mut nested),
        TensorMut::from_slice(&mut offset),
        TensorMut::from_slice(bytes),
    );
    CpuBackend::new().double_quantize(args.unwrap()).unwrap();
    (codes, nested, offset[0])
}

/// The order of the mean, written a second time: one lane at a time instead of one row at a time.
fn mean(values: &[f32]) -> f32 {
    let chunk_sum = |chunk: &[f32]| {
        let lane = |l: usize| chunk.iter().skip(l).step_by(256).fold(0.0, |sum, &value| sum + f64::from(value));
        let mut lanes: Vec<f64> = (0..256).map(lane).collect();
        while lanes.len() > 1 {
            let upper = lanes.split_off(lanes.len() / 2);
            lanes.iter_mut().zip(upper).for_each(|(low, high)| *low += high);
        }
        lanes[0]
    };
    (values.chunks(65536).map(chunk_sum).fold(0.0, |sum, chunk| sum + chunk) / values.len() as f64) as f32
}

#[test]
fn scales_become_codes_around_their_mean() {
    for n in [1, 255, 256, 257, 70_000, 200_001] {
        let absmax: Vec<f32> = normal(n, 6).into_iter().map(|x| x.abs() * 0.01).collect();
        let (codes, nested, offset) = double_quantize(&absmax);
        assert_eq!(offset, mean(&absmax));
        for (group, values) in absmax.chunks(256).enumerate() {
            let most = values.iter().map(|value| (value - offset).abs()).fold(0.0, f32::max);
            assert_eq!(nested[group], most);
            for (value, &code) in values.iter().zip(&codes[group * 256..]) {
                let expected = if most == 0.0 { 0 } else { encode_grid((value - offset) * (1.0 / most)) };
                assert_eq!(code, expected);
            }
        }
    }
}

#[test]
fn equal_scales_are_all_offset() {
    assert_eq!(double_quantize(&[0.25; 300]), (vec![0; 300], vec![0.0; 2], 0.25));
    assert_eq!(double_quantize(&[]), (vec![], vec![], 0.0));
}
