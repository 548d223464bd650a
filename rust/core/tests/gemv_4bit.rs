#![allow(clippy::unwrap_used)]

mod common;

use common::{QUANT_TYPES, backends, bits, cast, dequantize, normal, plain, quantize};
use half::{bf16, f16};
use halfbyte_core::ops::gemv_4bit::{Gemv4bit, Gemv4bitGroup, GemvShape};
use halfbyte_core::tensor::Float;
use halfbyte_core::{Absmax, Backend, CpuBackend, QuantType, TensorMut, TensorRef, parallel};

fn gemv<T: Float>(backend: &CpuBackend, x: &[T], weight: &Weight, m: usize) -> Vec<T> {
    let mut out = vec![T::from_f32(f32::NAN); m * weight.n];
    backend.gemv_4bit(product(x, weight, m, &mut out)).unwrap();
    out
}

fn product<'a, T: Float>(x: &'a [T], weight: &'a Weight, m: usize, out: &'a mut [T]) -> Gemv4bit<'a> {
    let args = Gemv4bit::new(
        TensorRef::from_slice(x),
        TensorRef::from_slice(&weight.packed),
        plain(&weight.absmax),
        weight.quant_type,
        weight.blocksize,
        TensorMut::from_slice(out),
        GemvShape { m, n: weight.n, k: weight.k },
    );
    args.unwrap()
}

struct Weight {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    quant_type: QuantType,
    blocksize: usize,
    n: usize,
    k: usize,
}

impl Weight {
    fn new(n: usize, k: usize, quant_type: QuantType, blocksize: usize) -> Self {
        let (packed, absmax) = quantize(&CpuBackend::oracle(), &normal(n * k, 11), quant_type, blocksize);
        Self { packed, absmax, quant_type, blocksize, n, k }
    }

    /// x Wᵀ in fp64, and the sum of |products| that bounds the rounding errors.
    fn product(&self, x: &[f32], m: usize) -> Vec<(f64, f64)> {
        let (n, k) = (self.n, self.k);
        let oracle = CpuBackend::oracle();
        let w: Vec<f32> =
            dequantize(&oracle, &self.packed, plain(&self.absmax), self.quant_type, self.blocksize, n * k);
        let products = |row: usize, column: usize| {
            (0..k).map(move |i| (row * k + i, column * k + i)).map(|(i, j)| f64::from(x[i]) * f64::from(w[j]))
        };
        let cell = |i: usize| (products(i / n, i % n).sum(), products(i / n, i % n).map(f64::abs).sum());
        (0..m * n).map(cell).collect()
    }
}

fn assert_close<T: Float>(weight: &Weight, m: usize, rounding: f64) {
    let x: Vec<T> = cast(&normal(m * weight.k, 4));
    let exact = weight.product(&x.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), m);
    for backend in backends() {
        for (value, (sum, bound)) in gemv(&backend, &x, weight, m).into_iter().zip(&exact) {
            let error = (f64::from(value.to_f32()) - sum).abs();
            assert!(error <= 1e-6 * bound + rounding * sum.abs() + 1e-7, "{error} {bound}");
        }
    }
}

#[test]
fn rows_of_whole_blocks_agree_with_fp64() {
    for quant_type in QUANT_TYPES {
        for (n, k, blocksize) in [(5, 64, 64), (33, 576, 64), (7, 256, 128), (3, 8192, 4096), (17, 96, 32)] {
            let weight = Weight::new(n, k, quant_type, blocksize);
            for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 17] {
                assert_close::<f32>(&weight, m, 0.0);
            }
            assert_close::<f16>(&weight, 2, 1e-3);
            assert_close::<bf16>(&weight, 2, 4e-3);
        }
    }
}

#[test]
fn rows_that_cut_blocks_agree_with_fp64() {
    for (n, k, blocksize) in [(1, 1, 64), (5, 13, 32), (7, 100, 64), (40, 80, 64), (9, 333, 128), (3, 200, 4096)] {
        let weight = Weight::new(n, k, QuantType::Nf4, blocksize);
        for m in [1, 3, 8, 9] {
            assert_close::<f32>(&weight, m, 0.0);
        }
        assert_close::<bf16>(&weight, 2, 4e-3);
    }
}

#[test]
fn a_row_depends_on_itself_only() {
    for (n, k) in [(300, 576), (50, 8192), (300, 100)] {
        let weight = Weight::new(n, k, QuantType::Nf4, 64);
        let x = normal(17 * k, 8);
        for backend in backends() {
            let together = gemv(&backend, &x, &weight, 17);
            for row in 0..17 {
                let alone = gemv(&backend, &x[row * k..(row + 1) * k], &weight, 1);
                assert_eq!(bits(&alone), bits(&together[row * n..(row + 1) * n]));
            }
        }
    }
}

#[test]
fn a_group_is_its_products() {
    for k in [576, 100] {
        let weights = [300, 0, 7, 130].map(|n| Weight::new(n, k, QuantType::Nf4, 64));
        for (backend, m) in backends().into_iter().flat_map(|backend| [(backend, 0), (backend, 1), (backend, 9)]) {
            let x = normal(m * k, 8);
            let mut outs = weights.each_ref().map(|weight| vec![f32::NAN; m * weight.n]);
            let products = weights.iter().zip(&mut outs).map(|(weight, out)| product(&x, weight, m, out)).collect();
            backend.gemv_4bit_group(Gemv4bitGroup::new(products).unwrap()).unwrap();
            for (out, weight) in outs.iter().zip(&weights) {
                assert_eq!(bits(out), bits(&gemv(&backend, &x, weight, m)));
            }
        }
    }
}

#[test]
fn a_group_is_of_one_x() {
    let weight = Weight::new(3, 64, QuantType::Nf4, 64);
    let (x, other, mut outs) = (normal(64, 1), normal(64, 2), [[0f32; 3]; 2]);
    let [first, second] = &mut outs;
    let products = vec![product(&x, &weight, 1, first), product(&other, &weight, 1, second)];
    let message = "products of one x: products must be of one x, got several";
    assert_eq!(Gemv4bitGroup::new(products).unwrap_err().to_string(), message);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for k in [576, 500] {
        let weight = Weight::new(1500, k, QuantType::Nf4, 64);
        let x = normal(3 * k, 8);
        let results = [1, 2, 3].map(|threads| {
            parallel::set_num_threads(threads);
            bits(&gemv(&CpuBackend::new(), &x, &weight, 3))
        });
        parallel::set_num_threads(0);
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn a_nan_stays_in_its_row() {
    for k in [128, 100] {
        let weight = Weight::new(6, k, QuantType::Nf4, 64);
        let mut x = normal(3 * k, 8);
        x[k + 3] = f32::NAN;
        for backend in backends() {
            let out = gemv(&backend, &x, &weight, 3);
            assert!(out[..6].iter().chain(&out[12..]).all(|value| value.is_finite()));
            assert!(out[6..12].iter().all(|value| value.is_nan()));
        }
    }
}

#[test]
fn an_infinite_input_is_not_lost_where_the_weight_is_zero() {
    let (packed, absmax) = quantize(&CpuBackend::oracle(), &[0f32; 64], QuantType::Nf4, 64);
    let weight = Weight { packed, absmax, quant_type: QuantType::Nf4, blocksize: 64, n: 1, k: 64 };
    for backend in backends() {
        assert!(gemv(&backend, &[f32::INFINITY; 64], &weight, 1)[0].is_nan());
    }
}

#[test]
fn empty_sides() {
    let weight = |n, k| Weight { packed: vec![], absmax: vec![], quant_type: QuantType::Nf4, blocksize: 64, n, k };
    for backend in backends() {
        assert_eq!(gemv(&backend, &[0f32; 0], &weight(3, 0), 2), [0.0; 6]);
        assert_eq!(gemv(&backend, &[1f32; 10], &weight(0, 5), 2), [0.0f32; 0]);
        assert_eq!(gemv(&backend, &[0f32; 0], &Weight::new(3, 64, QuantType::Nf4, 64), 0), [0.0f32; 0]);
    }
}

#[test]
fn a_wrong_output_is_named() {
    let (x, packed, absmax) = ([0f32; 64], [0u8; 96], [0f32; 3]);
    let (mut halves, mut short) = ([f16::ZERO; 3], [0f32; 2]);
    let check = |out: TensorMut<'_>| {
        let absmax = Absmax::Plain { absmax: TensorRef::from_slice(&absmax) };
        let (x, packed, shape) =
            (TensorRef::from_slice(&x), TensorRef::from_slice(&packed), GemvShape { m: 1, n: 3, k: 64 });
        Gemv4bit::new(x, packed, absmax, QuantType::Nf4, 64, out, shape).map(|_| ()).unwrap_err().to_string()
    };
    let message = "gemv_4bit: out must have dtype float32, got float16";
    assert_eq!(check(TensorMut::from_slice(&mut halves)), message);
    let message = "gemv_4bit: out must have 3 elements (M x N), got 2";
    assert_eq!(check(TensorMut::from_slice(&mut short)), message);
}
