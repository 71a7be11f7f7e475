// Package kstatus runs the library that Flux and kubectl-like tools judge objects by over statuses that
// Freehold wrote, one file for each phase: see crds/rules/tests/plan/recorded.rs, which writes them.
package kstatus

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

type recording struct {
	Expected status.Status             `json:"expected"`
	Object   unstructured.Unstructured `json:"object"`
}

func read(t *testing.T, path string) recording {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var found recording
	if err := json.Unmarshal(text, &found); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return found
}

func judge(t *testing.T, object *unstructured.Unstructured) *status.Result {
	t.Helper()
	result, err := status.Compute(object)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func TestEveryPhaseIsJudgedAsItIs(t *testing.T) {
	paths, err := filepath.Glob("recorded/*.json")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[status.Status]int{}
	for _, path := range paths {
		found := read(t, path)
		t.Run(filepath.Base(path), func(t *testing.T) {
			result := judge(t, &found.Object)
			if result.Status != found.Expected {
				t.Errorf("kstatus says %s (%s), expected %s", result.Status, result.Message, found.Expected)
			}
			if result.Status != status.CurrentStatus && result.Message == "" {
				t.Error("kstatus has no words for it")
			}
			seen[result.Status]++
		})
	}
	for _, wanted := range []status.Status{status.CurrentStatus, status.InProgressStatus, status.FailedStatus, status.TerminatingStatus} {
		if seen[wanted] == 0 {
			t.Errorf("no recording is %s, of %d", wanted, len(paths))
		}
	}
}

// An edit makes every status one of the past, until the operator has seen it.
func TestAnEditIsInProgressUntilItIsObserved(t *testing.T) {
	paths, err := filepath.Glob("recorded/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		found := read(t, path)
		if found.Object.GetDeletionTimestamp() != nil {
			continue
		}
		found.Object.SetGeneration(found.Object.GetGeneration() + 1)
		if result := judge(t, &found.Object); result.Status != status.InProgressStatus {
			t.Errorf("%s after an edit: %s, expected InProgress", path, result.Status)
		}
	}
}

// kstatus takes an object without a status for one that is as it should be. This is why the kinds give it one: what a
// real API server makes of a new object is a case of tests/tests/conformance/cases/freehold.yaml.
func TestWhatNobodyHasSeenIsInProgressByTheDefaultOfItsKind(t *testing.T) {
	for _, kind := range []string{"model", "policy", "probe", "machine"} {
		found := read(t, "recorded/"+kind+"-unseen.json")
		bare := found.Object.DeepCopy()
		unstructured.RemoveNestedField(bare.Object, "status")
		if result := judge(t, bare); result.Status != status.CurrentStatus {
			t.Errorf("%s without a status: %s; the default is needed no more", kind, result.Status)
		}
		if result := judge(t, &found.Object); result.Status != status.InProgressStatus {
			t.Errorf("%s that nobody has seen: %s", kind, result.Status)
		}
	}
}
