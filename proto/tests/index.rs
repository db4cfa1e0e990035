//! The layer index: any valid layer survives its encoding, through pages; rules that an index breaks are told.

use capsule_proto::index::{
    BuildError, Codec, Frame, Index, IndexBuilder, IndexHeader, MAX_FRAME_LEN, Reference,
    ReferenceTo, Run, RunFrom, Source, SourceKind, Space, Span,
};
use capsule_proto::{FrameHash, RootHash};
use proptest::collection::vec;
use proptest::prelude::*;

fn root(of: &str) -> RootHash {
    RootHash::of(of.as_bytes())
}

const PARENT_SIZE: u64 = 1 << 40;
const SOURCE_SIZE: u64 = 1 << 34;

fn sources(parent: Option<RootHash>) -> Vec<Source> {
    let parent = parent.map(|root| Source {
        kind: SourceKind::Parent,
        root,
        space: Space::Stream,
        size: PARENT_SIZE,
    });
    let other = |kind, space| Source {
        kind,
        root: RootHash::of(b"other"),
        space,
        size: SOURCE_SIZE,
    };
    let others = [
        other(SourceKind::ParentCapsule, Space::Contents),
        other(SourceKind::SameCapsule, Space::Stream),
    ];
    parent.into_iter().chain(others).collect()
}

fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let reference = (any::<bool>(), any::<u32>(), any::<u32>());
    let frame = (
        0u8..9,
        1u32..1 << 24,
        1u32..1 << 24,
        any::<[u8; 16]>(),
        vec(reference, 1..4),
        1u32..5,
    );
    prop_oneof![vec(frame.clone(), 0..10), vec(frame, 0..2500)].prop_map(|seeds| {
        let mut frames: Vec<Frame> = vec![];
        let mut pack_offset = 0;
        for (kind, len, pack_len, hash, references, spans) in seeds {
            let mut frame = Frame {
                pack_offset,
                pack_len,
                len,
                codec: Codec::Zstd,
                hash: FrameHash(hash),
                depth: 0,
                references: vec![],
                spans: vec![],
            };
            match kind {
                0 => (frame.codec, frame.pack_len) = (Codec::Stored, len),
                1 => frame.spans = split(len, spans),
                2 => {
                    frame.codec = Codec::Difference;
                    frame.references = vec![Reference {
                        to: ReferenceTo::Source(0),
                        offset: u64::from(pack_len),
                        len,
                    }];
                }
                3 => refer(&mut frame, Codec::ZstdReferences, &references, &frames),
                4 => refer(&mut frame, Codec::LzmaReferences, &references, &frames),
                5 => refer(&mut frame, Codec::Patch, &references, &frames),
                6 => frame.codec = Codec::Lzma,
                7 => refer(&mut frame, Codec::CodePatch, &references, &frames),
                _ => {}
            }
            pack_offset += u64::from(frame.pack_len);
            frames.push(frame);
        }
        frames
    })
}

fn split(len: u32, pieces: u32) -> Vec<Span> {
    let each = len / pieces;
    let lens = (0..pieces).map(|i| {
        if i == 0 {
            len - each * (pieces - 1)
        } else {
            each
        }
    });
    lens.filter(|&len| len > 0)
        .map(|len| Span {
            len,
            hash: FrameHash::of(&len.to_le_bytes()),
        })
        .collect()
}

fn refer(frame: &mut Frame, codec: Codec, seeds: &[(bool, u32, u32)], earlier: &[Frame]) {
    frame.codec = codec;
    for &(to_frame, which, len) in seeds {
        let at = which as usize % earlier.len().max(1);
        let reference = match earlier
            .get(at)
            .filter(|earlier| to_frame && earlier.depth < 8)
        {
            Some(to) => {
                frame.depth = frame.depth.max(to.depth + 1);
                let offset = len % to.len;
                Reference {
                    to: ReferenceTo::Frame(at as u32),
                    offset: offset.into(),
                    len: (to.len - offset).min(1 << 20),
                }
            }
            None => Reference {
                to: ReferenceTo::Source(1),
                offset: which.into(),
                len: len % (1 << 20) + 1,
            },
        };
        frame.references.push(reference);
    }
}

/// A layer of up to some pages of runs; without a parent, without gaps.
fn layer() -> impl Strategy<Value = (IndexHeader, Vec<Run>, Vec<Frame>)> {
    let run = (0u8..4, any::<u32>(), 1u64..1 << 20, any::<u32>());
    let runs = prop_oneof![vec(run.clone(), 0..10), vec(run, 4000..9000)];
    (frames(), runs, any::<bool>()).prop_map(|(frames, seeds, has_parent)| {
        let parent = has_parent.then(|| RootHash::of(b"parent"));
        let sources = sources(parent);
        let mut runs: Vec<Run> = vec![];
        let mut next = 0;
        for (kind, gap, len, which) in seeds {
            let start = next + if has_parent { u64::from(gap % 4096) } else { 0 };
            let frame = frames
                .get(which as usize % frames.len().max(1))
                .filter(|_| kind == 2);
            let (len, from) = match (kind, frame) {
                (1, _) => {
                    let source = (which % sources.len() as u32) as u16;
                    (
                        len,
                        RunFrom::Copy {
                            source,
                            offset: u64::from(which).min(SOURCE_SIZE - len),
                        },
                    )
                }
                (2, Some(frame)) => {
                    let offset = gap % frame.len;
                    let id = which % frames.len() as u32;
                    (
                        len.min(u64::from(frame.len - offset)),
                        RunFrom::Frame { id, offset },
                    )
                }
                _ => (len, RunFrom::Zero),
            };
            next = start + len;
            runs.push(Run { start, len, from });
        }
        let target_size = next + if has_parent { 77 } else { 0 };
        (
            IndexHeader {
                space: Space::Stream,
                parent,
                target: RootHash::of(b"target"),
                target_size,
                sources,
            },
            runs,
            frames,
        )
    })
}

/// The slow way to join runs that continue each other.
fn joined(runs: &[Run]) -> Vec<Run> {
    let mut joined: Vec<Run> = vec![];
    for run in runs {
        let continues = joined.last().is_some_and(|last| {
            last.end() == run.start
                && match (last.from, run.from) {
                    (RunFrom::Zero, RunFrom::Zero) => true,
                    (RunFrom::Copy { source, offset }, from) => {
                        from == RunFrom::Copy {
                            source,
                            offset: offset + last.len,
                        }
                    }
                    (RunFrom::Frame { id, offset }, from) => {
                        from == RunFrom::Frame {
                            id,
                            offset: offset + last.len as u32,
                        }
                    }
                    _ => false,
                }
        });
        match joined.last_mut().filter(|_| continues) {
            Some(last) => last.len += run.len,
            None => joined.push(*run),
        }
    }
    joined
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layers((header, runs, frames) in layer()) {
        let mut builder = IndexBuilder::new();
        for (id, frame) in frames.iter().enumerate() {
            prop_assert_eq!(builder.push_frame(frame.clone()), Ok(id as u32));
        }
        for run in &runs {
            prop_assert_eq!(builder.push_run(*run), Ok(()));
        }
        let bytes = builder.finish(&header);
        let index = Index::decode(&bytes).unwrap();
        prop_assert_eq!(index.directory.header(), &header);
        prop_assert_eq!(&index.runs, &joined(&runs));
        prop_assert_eq!(&index.frames, &frames);
        prop_assert_eq!(index.directory.pack_len(), frames.iter().map(|frame| u64::from(frame.pack_len)).sum::<u64>());
        // Every byte and frame is found in the page that the directory says.
        for run in index.runs.iter().step_by(501) {
            let page = index.directory.run_page_at(run.end() - 1).unwrap();
            let entry = index.directory.run_pages()[page];
            let page = index.directory.decode_runs(page, &bytes[entry.at as usize..][..entry.len as usize]).unwrap();
            prop_assert!(page.contains(run));
        }
        for (id, frame) in frames.iter().enumerate().step_by(301) {
            let page = index.directory.frame_page_of(id as u32).unwrap();
            let entry = index.directory.frame_pages()[page];
            let page = index.directory.decode_frames(page, &bytes[entry.at as usize..][..entry.len as usize]).unwrap();
            prop_assert_eq!(&page[id - entry.first as usize], frame);
        }
        prop_assert_eq!(index.directory.frame_page_of(frames.len() as u32), None);
    }
}

fn frame(codec: Codec, references: &[Reference]) -> Frame {
    let refers_to_frames = references
        .iter()
        .any(|reference| matches!(reference.to, ReferenceTo::Frame(_)));
    Frame {
        pack_offset: 0,
        pack_len: 100,
        len: 100,
        codec,
        hash: FrameHash::of(b""),
        depth: refers_to_frames.into(),
        references: references.to_vec(),
        spans: vec![],
    }
}

#[test]
fn frames_that_readers_would_refuse_are_not_built() {
    let reference = |to, len| Reference { to, offset: 0, len };
    let old = |len| reference(ReferenceTo::Source(0), len);
    let plain = frame(Codec::Zstd, &[]);
    let span = |len| Span {
        len,
        hash: FrameHash::of(b""),
    };
    let refused = [
        (
            Frame {
                len: 0,
                ..plain.clone()
            },
            "not empty",
        ),
        (
            Frame {
                len: MAX_FRAME_LEN as u32 + 1,
                ..plain.clone()
            },
            "at most 16 MiB",
        ),
        (
            Frame {
                pack_len: u32::MAX,
                ..plain.clone()
            },
            "no longer in the pack",
        ),
        (
            Frame {
                pack_len: 99,
                ..frame(Codec::Stored, &[])
            },
            "as long in the pack",
        ),
        (frame(Codec::Zstd, &[old(9)]), "codecs with references"),
        (frame(Codec::ZstdReferences, &[]), "codecs with references"),
        (frame(Codec::Lzma, &[old(9)]), "codecs with references"),
        (frame(Codec::LzmaReferences, &[]), "codecs with references"),
        (frame(Codec::Patch, &[]), "codecs with references"),
        (frame(Codec::CodePatch, &[]), "codecs with references"),
        (
            frame(Codec::ZstdReferences, &[old(1); 65]),
            "at most 64 references",
        ),
        (
            frame(Codec::ZstdReferences, &[old(9 << 20); 2]),
            "16 MiB together",
        ),
        (
            frame(Codec::ZstdReferences, &[old(0)]),
            "reference is not empty",
        ),
        (
            frame(
                Codec::ZstdReferences,
                &[reference(ReferenceTo::Frame(1), 1)],
            ),
            "go back",
        ),
        (frame(Codec::Difference, &[old(99)]), "at least as long"),
        (
            Frame {
                depth: 1,
                ..frame(Codec::ZstdReferences, &[old(1)])
            },
            "depth",
        ),
        (
            Frame {
                depth: 9,
                ..frame(
                    Codec::ZstdReferences,
                    &[reference(ReferenceTo::Frame(0), 1)],
                )
            },
            "depth",
        ),
        (
            Frame {
                spans: vec![span(1); 4097],
                ..plain.clone()
            },
            "4,096 spans",
        ),
        (
            Frame {
                spans: vec![span(100), span(0)],
                ..plain.clone()
            },
            "span is not empty",
        ),
        (
            Frame {
                spans: vec![span(99)],
                ..plain.clone()
            },
            "end with the frame",
        ),
    ];
    for (frame, rule) in refused {
        let mut builder = IndexBuilder::new();
        builder.push_frame(plain.clone()).unwrap();
        let error = builder
            .push_frame(Frame {
                pack_offset: 100,
                ..frame
            })
            .unwrap_err();
        assert!(
            matches!(error, BuildError::Frame { id: 1, .. }) && error.to_string().contains(rule),
            "{rule}: {error}"
        );
    }
    let run = |start, len| Run {
        start,
        len,
        from: RunFrom::Zero,
    };
    for runs in [
        [run(0, 5), run(4, 1)],
        [run(0, 1), run(1, 0)],
        [run(0, 1), run(u64::MAX, 2)],
        [run(0, 1), run(1 << 50, 1)],
    ] {
        let mut builder = IndexBuilder::new();
        builder.push_run(runs[0]).unwrap();
        assert_eq!(
            builder.push_run(runs[1]),
            Err(BuildError::RunOutOfOrder(runs[1].start))
        );
    }
}

fn header(parent_size: Option<u64>, target_size: u64) -> IndexHeader {
    let parent = parent_size.map(|_| root("parent"));
    let source = |size| Source {
        kind: SourceKind::Parent,
        root: root("parent"),
        space: Space::Stream,
        size,
    };
    let sources = parent_size.into_iter().map(source).collect();
    IndexHeader {
        space: Space::Stream,
        parent,
        target: root("target"),
        target_size,
        sources,
    }
}

fn index(header: &IndexHeader, runs: &[Run], frames: &[Frame]) -> Result<Index, String> {
    let mut builder = IndexBuilder::new();
    runs.iter().for_each(|run| builder.push_run(*run).unwrap());
    for frame in frames {
        builder
            .push_frame(Frame {
                pack_offset: builder.pack_len(),
                ..frame.clone()
            })
            .unwrap();
    }
    Index::decode(&builder.finish(header)).map_err(|error| error.to_string())
}

#[test]
fn only_what_the_parent_reaches_is_inherited() {
    let run = |start, len| Run {
        start,
        len,
        from: RunFrom::Zero,
    };
    // The runs, the target's length, and how long the parent must be at least.
    let cases: &[(&[Run], u64, u64)] = &[
        (&[], 50, 50),
        (&[run(10, 5)], 15, 10),
        (&[run(0, 5), run(20, 5)], 25, 20),
        (&[run(0, 5), run(20, 5)], 30, 30),
    ];
    for &(runs, target_size, needed) in cases {
        assert!(
            index(&header(Some(needed), target_size), runs, &[]).is_ok(),
            "{runs:?}"
        );
        for header in [
            header(Some(needed - 1), target_size),
            header(None, target_size),
        ] {
            let error = index(&header, runs, &[]).unwrap_err();
            assert!(error.contains("not mentioned"), "{runs:?}: {error}");
        }
    }
}

#[test]
fn runs_and_references_stay_within_what_they_read() {
    let from = |from| Run {
        start: 0,
        len: 50,
        from,
    };
    let plain = frame(Codec::Zstd, &[]);
    let runs = [
        from(RunFrom::Frame { id: 0, offset: 51 }),
        from(RunFrom::Frame { id: 1, offset: 0 }),
        from(RunFrom::Copy {
            source: 0,
            offset: 951,
        }),
        from(RunFrom::Copy {
            source: 1,
            offset: 0,
        }),
    ];
    for run in runs {
        assert!(
            index(
                &header(Some(1000), 50),
                &[run],
                std::slice::from_ref(&plain)
            )
            .is_err(),
            "{run:?}"
        );
    }
    let fits = from(RunFrom::Frame { id: 0, offset: 50 });
    assert!(
        index(
            &header(Some(1000), 50),
            &[fits],
            std::slice::from_ref(&plain)
        )
        .is_ok()
    );
    let to = |to, offset| {
        frame(
            Codec::ZstdReferences,
            &[Reference {
                to,
                offset,
                len: 50,
            }],
        )
    };
    let to_frame = |offset| to(ReferenceTo::Frame(0), offset);
    assert!(
        index(
            &header(Some(1000), 1000),
            &[],
            &[plain.clone(), to_frame(50)]
        )
        .is_ok()
    );
    assert!(
        index(
            &header(Some(1000), 1000),
            &[],
            &[plain.clone(), to_frame(51)]
        )
        .is_err()
    );
    assert!(
        index(
            &header(Some(1000), 1000),
            &[],
            &[plain.clone(), to(ReferenceTo::Source(0), 951)]
        )
        .is_err()
    );
    assert!(
        index(
            &header(Some(1000), 1000),
            &[],
            &[plain.clone(), to(ReferenceTo::Source(1), 0)]
        )
        .is_err()
    );
    // Frame 2 claims to be as shallow as what it refers to.
    let deep = frame(
        Codec::ZstdReferences,
        &[Reference {
            to: ReferenceTo::Frame(1),
            offset: 0,
            len: 50,
        }],
    );
    assert!(
        index(&header(Some(1000), 1000), &[], &[plain, to_frame(0), deep])
            .unwrap_err()
            .contains("depth")
    );
}

#[test]
fn sources_are_the_parent_first_and_never_the_target() {
    let good = header(Some(50), 50);
    assert!(index(&good, &[], &[]).is_ok());
    let other = Source {
        kind: SourceKind::SameCapsule,
        ..good.sources[0].clone()
    };
    let target = Source {
        root: root("target"),
        ..other.clone()
    };
    let with = |sources: &[Source]| IndexHeader {
        sources: sources.to_vec(),
        ..good.clone()
    };
    let bad = [
        with(&[]),
        with(std::slice::from_ref(&other)),
        with(&[other, good.sources[0].clone()]),
        with(&[good.sources[0].clone(), good.sources[0].clone()]),
        with(&[good.sources[0].clone(), target]),
        with(&[Source {
            space: Space::Contents,
            ..good.sources[0].clone()
        }]),
        IndexHeader {
            parent: Some(root("else")),
            ..good.clone()
        },
        IndexHeader {
            target: root("parent"),
            ..good.clone()
        },
        IndexHeader {
            parent: None,
            ..good.clone()
        },
    ];
    for header in bad {
        assert!(index(&header, &[], &[]).is_err(), "{header:?}");
    }
}
